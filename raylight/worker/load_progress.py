"""Progress of reading weights: shown by the driver, and where a cancel ends it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from raylight.cluster.run import Run
from raylight.host.jobs import LoadProgress
from raylight.host.log_messages import gb
from raylight.host.recipe import ModelRecipe
from raylight.sharding import staged_read
from raylight.sharding.staged_read import ReadingStopped

_INTERVAL_S = 0.25

_current: tuple[Run, ModelRecipe] | None = None


@contextmanager
def for_run(run: Run, recipe: ModelRecipe) -> Iterator[None]:
    """Within it `reported` is progress of this run, which needs the model of `recipe`."""
    global _current
    before, _current = _current, (run, recipe)
    try:
        yield
    finally:
        _current = before


@contextmanager
def reported(total_bytes: Callable[[], int], may_stop: bool) -> Iterator[None]:
    """Emit the progress of what is read within this context: as many bytes as `total_bytes` returns at the first of
    them, or less if ComfyUI leaves weights in the file. Does nothing outside of `for_run`.

    With `may_stop` a read raises ReadingStopped: when this rank was asked to cancel.
    """
    if _current is None:
        yield
        return
    run, recipe = _current
    report = _Report(run, recipe.name, total_bytes, may_stop)
    with staged_read.reported_to(report):
        yield
    report.end()


class _Report:
    def __init__(self, run: Run, name: str, total_bytes: Callable[[], int], may_stop: bool) -> None:
        self._run, self._name, self._find_total, self._may_stop = run, name, total_bytes, may_stop
        self._done, self._total = 0, 0
        self._emitted, self._emitted_at = False, time.monotonic()

    def __call__(self, nbytes: int) -> None:
        if self._done == 0:
            self._total = self._find_total()
        self._done += nbytes
        if self._may_stop and self._run.cancel_requested:
            raise ReadingStopped
        if time.monotonic() - self._emitted_at >= _INTERVAL_S:
            self._emit(min(self._done, self._total))

    def end(self) -> None:
        """Emit the end, if there was progress to see."""
        if self._emitted:
            self._emit(self._total)

    def _emit(self, done: int) -> None:
        self._run.emit(LoadProgress(self._name, done, self._total))
        # On every rank: one that reads for long is not stalled.
        self._run.enter(f"reading {self._name} ({gb(done)} of {gb(self._total)})")
        self._emitted, self._emitted_at = True, time.monotonic()
