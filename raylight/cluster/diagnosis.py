"""What went wrong with the workers, in words: which rank, in what, by which cause, and what it said last."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ray.exceptions import ObjectStoreFullError, OutOfDiskError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from .actor import Place
from .errors import DIED, FAILED, OUT_OF_MEMORY, StoreFull, WorkerError, is_out_of_memory
from .ray_runtime import RUNTIME

# How errors read that a rank meets because another is gone: no causes.
_OF_PEERS = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "gloo",
    "nccl",
    "timed out waiting",
    "processgroup",
    "socket",
    "store->get",
    "wait timeout",
)
_NO_TRACE = (
    "its process ended without a trace: it was killed, or crashed. The system ends the process that takes "
    "most when memory runs out"
)
_OOM_COUNT = Path("/proc/vmstat")


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: `rank` is None where it is of no single rank. `cause` is a sentence without its full stop."""

    kind: str
    rank: int | None
    cause: str


@dataclass(frozen=True, slots=True)
class WorkerStates:
    """What is known of the ranks, each by number: their place, what they were at, and the last lines of their logs."""

    places: Mapping[int, object] = field(default_factory=dict)
    phases: Mapping[int, str] = field(default_factory=dict)
    last_lines: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    def place(self, rank: int) -> str:
        return str(self.places.get(rank, f"rank {rank}"))


def to_error(fault: Fault, scene: WorkerStates) -> WorkerError:
    """The error of a fault, as a person reads it."""
    if fault.rank is None:
        return WorkerError(f"{fault.cause}.", fault.kind)
    verb = {DIED: "died", OUT_OF_MEMORY: "ran out of memory"}.get(fault.kind, "failed")
    phase = scene.phases.get(fault.rank)
    cause = _of_machine(fault.cause, getattr(scene.places.get(fault.rank), "gpu", None))
    text = f"{scene.place(fault.rank)} {verb}{f' while {phase}' if phase else ''}: {cause}."
    lines = scene.last_lines.get(fault.rank, ())
    if lines:
        text += "\nIt said last:\n" + "\n".join(f"  {line}" for line in lines)
    return WorkerError(text, fault.kind)


def root_cause(failures: Mapping[int, BaseException]) -> Fault:
    """The cause among what the ranks failed of, in the order in which they did: a rank that died, else the first whose
    error is its own and not one that it met because another was gone."""
    for rank, error in failures.items():
        if isinstance(error, (RayActorError, OutOfMemoryError)):
            return of_process(rank, error, False)
    causes = {rank: cause_of(error) for rank, error in failures.items()}
    rank = next((rank for rank, cause in causes.items() if not is_of_peers(cause)), next(iter(causes)))
    cause = causes[rank]
    if is_out_of_memory(cause):
        return Fault(OUT_OF_MEMORY, rank, _sentence(str(cause)))
    return Fault(FAILED, rank, _sentence(f"{type(cause).__name__}: {cause}"))


def cause_of(error: BaseException) -> BaseException:
    """What was raised in the worker."""
    return error.cause if isinstance(error, RayTaskError) and error.cause is not None else error


def store_full(what: str, error: BaseException) -> StoreFull:
    """The error of an object that found no room in Ray's store."""
    if isinstance(cause_of(error), OutOfDiskError):
        return StoreFull(
            f"{what} finds no room: Ray's object store is full, and so is the disk that it falls "
            f"back on. Free space on the disk of the temporary folder, or give the store more memory by "
            f"ray_object_store_gb of the advanced initializer"
        )
    return StoreFull(
        f"{what} finds no room in Ray's object store: raise ray_object_store_gb of the advanced initializer"
    )


def is_store_full(error: BaseException) -> bool:
    return isinstance(cause_of(error), (ObjectStoreFullError, OutOfDiskError))


def oom_kills() -> int:
    """How many processes the system has ended for want of memory since it started; 0 where it does not say."""
    try:
        fields = dict(line.split() for line in _OOM_COUNT.read_text().splitlines())
    except OSError:
        return 0
    return int(fields.get("oom_kill", 0))


def of_process(rank: int, error: RayError, killed_for_memory: bool) -> Fault:
    """The fault of a rank whose process is gone, by what Ray says of it; `killed_for_memory` tells that the system has
    ended a process for want of memory."""
    if isinstance(error, OutOfMemoryError):
        return Fault(
            OUT_OF_MEMORY,
            rank,
            "the memory of the machine was almost full, and Ray ended this worker's "
            "process before the system would freeze",
        )
    if killed_for_memory:
        return Fault(
            OUT_OF_MEMORY, rank, "the memory of the machine was full, and the system ended this worker's process"
        )
    return Fault(DIED, rank, _NO_TRACE)


def is_of_peers(error: BaseException) -> bool:
    """Whether it is what a rank meets because another is gone."""
    text = f"{type(error).__name__}: {error}".lower()
    return isinstance(error, RuntimeError) and not is_out_of_memory(error) and any(mark in text for mark in _OF_PEERS)


def _of_machine(cause: str, gpu: int | None) -> str:
    """PyTorch's number of the GPU, which counts what the worker sees, replaced by the machine's."""
    return cause if gpu is None else re.sub(r"\bGPU 0\b", f"GPU {gpu}", cause)


def _sentence(text: str) -> str:
    return text.strip().rstrip(".")


STEP = "step"  # with which the phases of a sampler's steps begin, and only these
_PATIENCE_S = 1.5
_LAST_BYTES, _LAST_LINES = 4096, 12
_RAYS_OWN = (":job_id:", ":actor_name:", ":task_name:")  # marks for Ray's own reader of these files


def is_overdue(since_cancel_s: float, phases: Iterable[str]) -> bool:
    """Whether workers should be ended that were asked to cancel: a step may take its time, all else may not."""
    return since_cancel_s > _PATIENCE_S and not any(phase.startswith(STEP) for phase in phases)


def printed(place: Place) -> dict[str, int]:
    """How many bytes the process of a worker on this machine has printed until now, by file."""
    folder = RUNTIME.log_folder
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
