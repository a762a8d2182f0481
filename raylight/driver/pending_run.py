"""Runs that are ready for the workers: their jobs, how their progress is shown, and their results."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from raylight.cluster.errors import WorkerError
from raylight.cluster.session import Session
from raylight.host.jobs import RunJob, RunResult, StepDone, set_random_state
from raylight.host.worker_service import WorkerService

from .short_of_memory import may_repeat
from .status import how
from .step_times import StepClock
from .workers import ask_with_room

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class PendingRun:
    """A run for the workers of `session`. `callback` is ComfyUI's, to be called after each step, or None. `renewed`
    returns the same run again, for the workers of that moment.
    """

    session: Session
    job: RunJob
    callback: Callable[..., Any] | None
    shows_bar: bool
    renewed: Callable[[], PendingRun]
    _bar: tqdm | None = field(default=None, init=False)
    _has_reported: bool = field(default=False, init=False)

    @property
    def may_be_repeated(self) -> bool:
        """Whether code that looks at all of every step has seen none yet: it might count on each step coming once."""
        return not (self._has_reported and self.job.every_step)

    def report(self, step: StepDone) -> None:
        """Show a step on the terminal, and pass it to ComfyUI's callback."""
        self._has_reported = True
        if self._bar is None:
            self._bar = tqdm(total=step.total, disable=not self.shows_bar)
        self._bar.update(step.step + 1 - self._bar.n)
        self._call_back(step)

    def close_bar(self) -> None:
        """End the progress bar: no more steps follow."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def conclude(self, result: RunResult) -> Tensor:
        """Return the latent of the run, (B, C, [T,] H, W) or packed, on the CPU. Leave the random generators as if the
        run had been done in this process.
        """
        if result.last is not None:
            self._call_back(result.last)
        set_random_state(result.random)
        return result.samples

    def _call_back(self, step: StepDone) -> None:
        if self.callback is not None:
            self.callback(step.step, step.x0, step.x, step.total)


def complete(pending: Sequence[PendingRun]) -> list[RunResult]:
    """Have the workers do runs of one model and one session, at the same time where there are several groups of
    workers. Return the results in order. If memory runs out that was held for speed alone, do them once more without.

    Raises what `workers.ask_all` raises.
    """
    try:
        return _complete(pending)
    except WorkerError as error:
        if not all(one.may_be_repeated for one in pending) or not may_repeat(error, pending[0].job.model):
            raise
    return _complete([one.renewed() for one in pending])


def _complete(pending: Sequence[PendingRun]) -> list[RunResult]:
    first = pending[0]
    if len(pending) > 1:
        logger.info("the workers do %d runs at once", len(pending))
    else:
        with_code = ", with the code of node packs" if first.job.model.inside.full_tokens_for else ""
        logger.info("the workers do the whole run%s", with_code)

    clock = StepClock()

    def on_event(event: tuple[int, StepDone]) -> None:
        place, step = event
        pending[place].report(step)
        if place == 0:
            clock.tick()

    try:
        answers = ask_with_room(
            first.session, WorkerService.sample, tuple(one.job for one in pending), first.job.model.recipe, on_event
        )
    finally:
        for one in pending:
            one.close_bar()
    config = first.session.config
    clock.keep(first.job, how(config), config.world_size, len(pending))
    by_place = {place: result for of_rank in answers.values() for place, result in of_rank.items()}
    return [by_place[place] for place in range(len(pending))]
