"""Several runs at once: each group of workers does some of them.

Nodes of ComfyUI sample one after the other and wait for each. So each run is begun twice: the first time only to see
what it hands over to the workers, the second time, when the workers have done all, to get its result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from raylight.host.jobs import RunJob, RunResult
from raylight.host.pickling import CannotTravel

T = TypeVar("T")


class Teller(Protocol):
    """Who is told of a run's steps, and of their end."""

    def __call__(self, step: Any) -> None: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class Handed:
    """What a run has handed over: its job, who is told of its steps, and how its result is made of theirs."""

    job: RunJob
    tell: Teller
    conclude: Callable[[RunResult], Any]


Finish = Callable[[Sequence[Handed]], list[RunResult]]


class _HandedOver(BaseException):
    """Ends a run that was begun to see what it hands over. No error, so no handler of errors may stop it."""

    def __init__(self, handed: Handed) -> None:
        self.handed = handed


@dataclass(slots=True)
class _Together:
    results: list[RunResult] | None = None
    seen: list[Handed] = field(default_factory=list)


_together: _Together | None = None


def run_batched(runs: Sequence[Callable[[], T]], finish: Finish) -> list[T]:
    """What each of `runs` returns, in their order; `finish` has what they hand over done. What a run does not hand over
    it does by itself."""
    global _together
    _together = _Together()
    done: dict[int, T] = {}
    try:
        for place, run in enumerate(runs):
            try:
                done[place] = run()
            except _HandedOver as ended:
                _together.seen.append(ended.handed)
        handed = _together.seen
        if handed and all(one.job.model == handed[0].job.model for one in handed):
            try:
                _together.results = finish(handed)
            except CannotTravel:  # each finds another way
                _together = None
        else:
            _together = None
        return [done[place] if place in done else run() for place, run in enumerate(runs)]
    finally:
        _together = None


def join_batch(handed: Handed) -> Any:
    """Called by a run with what it hands over; what it returns is the run's result, None where it is to be done now."""
    if _together is None:
        return None
    if _together.results is None:
        raise _HandedOver(handed)
    return handed.conclude(_together.results.pop(0)) if _together.results else None
