"""How workers end: when a cancel has waited long enough, what a process said last, and that it is gone."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable

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


def last_output(place: Place) -> tuple[str, ...]:
    """The last lines that the process of a worker on this machine has printed, such as the stack of a crash."""
    folder = local_ray.log_folder()
    lines: list[str] = []
    for path in glob.glob(os.path.join(folder, f"worker-*-{place.pid}.err")) if folder else ():
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - _LAST_BYTES))
            lines += file.read().decode(errors="replace").splitlines()
    return tuple(line for line in lines if line.strip() and not line.startswith(_RAYS_OWN))[-_LAST_LINES:]
