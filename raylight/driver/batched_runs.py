"""Several runs at once: each group of workers does some of them.

Nodes of ComfyUI sample one after the other and wait for each. So each run is begun twice: the first time only to see
what it hands over to the workers, the second time, when the workers have done all, to get its result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from raylight.host.jobs import RunJob, RunResult
from raylight.host.pickling import NotSerializableError

T = TypeVar("T")


class Progress(Protocol):
    """Who is told of a run's steps, and of their end."""

    def __call__(self, step: Any) -> None: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class PendingRun:
    """What a run has handed over: its job, who is told of its steps, and how its result is made of theirs."""

    job: RunJob
    tell: Progress
    conclude: Callable[[RunResult], Any]


Finish = Callable[[Sequence[PendingRun]], list[RunResult]]


class _Deferred(BaseException):
    """Ends a run that was begun to see what it hands over. No error, so no handler of errors may stop it."""

    def __init__(self, pending: PendingRun) -> None:
        self.pending = pending


@dataclass(slots=True)
class _Batch:
    results: list[RunResult] | None = None
    seen: list[PendingRun] = field(default_factory=list)


_batch: _Batch | None = None


def run_batched(runs: Sequence[Callable[[], T]], finish: Finish) -> list[T]:
    """What each of `runs` returns, in their order; `finish` has what they hand over done. What a run does not hand over
    it does by itself."""
    global _batch
    _batch = _Batch()
    done: dict[int, T] = {}
    try:
        for place, run in enumerate(runs):
            try:
                done[place] = run()
            except _Deferred as ended:
                _batch.seen.append(ended.pending)
        pending = _batch.seen
        if pending and all(one.job.model == pending[0].job.model for one in pending):
            try:
                _batch.results = finish(pending)
            except NotSerializableError:  # each finds another way
                _batch = None
        else:
            _batch = None
        return [done[place] if place in done else run() for place, run in enumerate(runs)]
    finally:
        _batch = None


def join_batch(pending: PendingRun) -> Any:
    """Called by a run with what it hands over; what it returns is the run's result, None where it is to be done now."""
    if _batch is None:
        return None
    if _batch.results is None:
        raise _Deferred(pending)
    return pending.conclude(_batch.results.pop(0)) if _batch.results else None
