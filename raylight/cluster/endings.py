"""How workers end: when a cancel has waited long enough, what a process said last, and that it is gone."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Mapping

import psutil

from . import local_ray
from .actor import Place

STEP = "step"  # with which the phases of a sampler's steps begin, and only these
_PATIENCE_S = 1.5
_GONE_S = 5.0
_LAST_BYTES, _LAST_LINES = 4096, 12
_RAYS_OWN = (":job_id:", ":actor_name:", ":task_name:")  # marks for Ray's own reader of these files


def is_overdue(since_cancel_s: float, phases: Iterable[str]) -> bool:
    """Whether workers should be ended that were asked to cancel: a step may take its time, all else may not."""
    return since_cancel_s > _PATIENCE_S and not any(phase.startswith(STEP) for phase in phases)


def kill(pids: Iterable[int]) -> None:
    """End the processes of workers on this machine, stopped ones too, and wait until their memory is back."""
    processes = []
    for pid in pids:
        try:
            process = psutil.Process(pid)
            if process.name().startswith("ray::"):  # the number may be another's by now
                process.kill()
                processes.append(process)
        except psutil.Error:
            continue
    psutil.wait_procs(processes, timeout=_GONE_S)


def printed(place: Place) -> dict[str, int]:
    """How many bytes the process of a worker on this machine has printed until now, by file."""
    folder = local_ray.log_folder()
    # Names of folders may hold what `glob` takes for patterns.
    paths = glob.glob(os.path.join(glob.escape(folder), f"worker-*-{place.pid}.err")) if folder else ()
    return {path: os.path.getsize(path) for path in paths}


def last_output(place: Place, before: Mapping[str, int]) -> tuple[str, ...]:
    """The last lines that the process of a worker on this machine has printed, such as the stack of a crash, but not
    what it had printed `before`."""
    lines: list[str] = []
    for path, size in printed(place).items():
        with open(path, "rb") as file:
            file.seek(max(before.get(path, 0), size - _LAST_BYTES))
            lines += file.read().decode(errors="replace").splitlines()
    return tuple(line for line in lines if line.strip() and not line.startswith(_RAYS_OWN))[-_LAST_LINES:]
