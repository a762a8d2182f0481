"""The moments of a start: what was done when, in ComfyUI's process and in each worker."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field


class Timeline:
    """What has ended when, in seconds since the epoch, which processes of one machine have in common.

    `ranks` are the moments of the workers, as far as they are known.
    """

    def __init__(self) -> None:
        self.began = time.time()
        self.moments: dict[str, float] = {}
        self.ranks: list[dict[str, float]] = []

    def mark(self, what: str, moment: float | None = None) -> None:
        """Note that `what` has ended now, or at `moment`. What is marked twice has the last one."""
        self.moments[what] = time.time() if moment is None else moment


WORKER = Timeline()
"""That of this process, if it is a worker."""


@dataclass(frozen=True, slots=True)
class StartTimes:
    """What has ended when in a start, in seconds from its beginning, in order.

    `session` is of ComfyUI's process, `ranks` of the worker that was the last to end each. `imports` are the seconds of
    what was imported once for all, beside the start of Ray, by module. `forked` is how many workers were forked.
    """

    total_s: float
    session: dict[str, float]
    ranks: dict[str, float]
    imports: dict[str, float] = field(default_factory=dict)
    forked: int = 0

    @classmethod
    def of(cls, timeline: Timeline, forks: tuple[int, dict[str, float]]) -> StartTimes:
        """Return the times of a start that ends now. `forks` is what `RayRuntime.forks` returns."""
        last: dict[str, float] = {}
        for moments in timeline.ranks:
            for what, moment in moments.items():
                last[what] = max(moment, last.get(what, moment))
        total_s = time.time() - timeline.began
        return cls(total_s, _since(timeline.began, timeline.moments), _since(timeline.began, last), forks[1], forks[0])

    def __str__(self) -> str:
        parts = [_list(self.session), f"last worker: {_list(self.ranks)}"]
        parts.append(f"{self.forked} forked")
        if self.imports:
            parts.append(f"their imports took {sum(self.imports.values()):.1f}")
        return "; ".join(parts)


def _since(began: float, moments: Mapping[str, float]) -> dict[str, float]:
    return {what: round(moment - began, 2) for what, moment in sorted(moments.items(), key=lambda item: item[1])}


def _list(times: Mapping[str, float]) -> str:
    return ", ".join(f"{what} {seconds:.1f}" for what, seconds in times.items())
