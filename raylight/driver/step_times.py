"""How long the steps of the last runs took, by model file."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from dataclasses import dataclass

from raylight.host.jobs import RunJob

_KEPT = 20  # runs
_LEAST_STEPS = 3  # of which the first has what is done once, such as loading


@dataclass(frozen=True, slots=True)
class RunTime:
    """`runs` runs at once of a model, the median seconds of a step, and the workers that did it. `seconds` of several
    runs at once are of one step of each.
    """

    path: str
    latent_shape: tuple[int, ...]
    sharding: str
    how: str
    workers: int
    steps: int
    seconds: float
    runs: int = 1


_lock = threading.Lock()
_last: deque[RunTime] = deque(maxlen=_KEPT)


class StepClock:
    """Notes when steps end."""

    def __init__(self) -> None:
        self._moments: list[float] = []

    def tick(self) -> None:
        """Note that a step has ended now."""
        self._moments.append(time.monotonic())

    def keep(self, job: RunJob, how: str, workers: int, runs: int) -> None:
        """Keep the time of a step, if there were enough of them for one."""
        if len(self._moments) < _LEAST_STEPS:
            return
        each = [after - before for before, after in zip(self._moments, self._moments[1:], strict=False)]
        recipe = job.model.recipe
        taken = RunTime(
            recipe.path,
            job.latent_shape,
            recipe.sharding,
            how,
            workers,
            len(self._moments),
            statistics.median(each),
            runs,
        )
        with _lock:
            _last.append(taken)


def last_runs(path: str) -> list[RunTime]:
    """Return the last runs of a model file since ComfyUI started, the newest first."""
    with _lock:
        return [one for one in reversed(_last) if one.path == path]
