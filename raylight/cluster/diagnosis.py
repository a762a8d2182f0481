"""Failures of workers: their root cause, and the error that the user sees."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ray.exceptions import ObjectStoreFullError, OutOfDiskError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from .errors import CRASHED, DIED, FAILED, OUT_OF_MEMORY, OutOfMemory, StoreFull, WorkerError, is_out_of_memory
from .place import Place
from .worker_output import kind_of_crash

# In errors that a rank meets because another rank has gone. They are no root cause.
_LOST_PEER_MARKS = (
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
_VMSTAT = Path("/proc/vmstat")

Remedies = Callable[[str], str]
"""Return sentences with what the user can do about a failure of a kind, "" for nothing."""


def no_remedies(_kind: str) -> str:
    """Return no remedies."""
    return ""


@dataclass(frozen=True, slots=True)
class Failure:
    """A failure of a rank, or of none in particular if `rank` is None.

    `kind` is one of `errors`, `cause` is a sentence without its full stop, and `error` is what the rank raised, if
    anything.
    """

    kind: str
    rank: int | None
    cause: str
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class WorkerStates:
    """The ranks' places, phases and last log lines, as far as they are known."""

    places: Mapping[int, Place] = field(default_factory=dict)
    phases: Mapping[int, str] = field(default_factory=dict)
    last_lines: Mapping[int, tuple[str, ...]] = field(default_factory=dict)


def to_error(failure: Failure, states: WorkerStates, remedies: Remedies = no_remedies) -> WorkerError:
    """Return the error that the user sees: rank and place, phase, root cause, last output, and remedies."""
    rank, cause, kind = failure.rank, failure.cause, failure.kind
    if rank is None:
        return worker_error(f"{cause}.", failure.kind, remedies)
    place = states.places.get(rank)
    if place is not None and place.gpu is not None:
        # PyTorch's number counts what the worker sees, which is one GPU.
        cause = re.sub(r"\bGPU 0\b", f"GPU {place.gpu}", cause)
    lines = states.last_lines.get(rank, ())
    if kind == DIED and (crash := kind_of_crash(lines)):
        cause, kind = f"its process crashed ({crash})", CRASHED
    verb = {CRASHED: "died", DIED: "died", OUT_OF_MEMORY: "ran out of memory"}.get(kind, "failed")
    phase = f" while {states.phases[rank]}" if states.phases.get(rank) else ""
    text = f"{place or f'rank {rank}'} {verb}{phase}: {cause}."
    if lines:
        text += "\n  ".join(("\nLast output:", *lines))
    raised = None if failure.error is None else cause_of(failure.error)
    return worker_error(text, kind, remedies, raised.spare_bytes if isinstance(raised, OutOfMemory) else 0)


def worker_error(message: str, kind: str, remedies: Remedies, spare_bytes: int = 0) -> WorkerError:
    """Return an error with the remedies for its kind."""
    return WorkerError("\n".join(filter(None, (message, remedies(kind)))), kind, spare_bytes)


def root_cause(errors: Mapping[int, BaseException]) -> Failure:
    """Return the root cause among the ranks' errors, which are in the order in which the ranks failed.

    It is a dead rank if there is one, else the first error that was not caused by another rank's exit (broken pipe,
    closed peer).
    """
    for rank, error in errors.items():
        if isinstance(error, (RayActorError, OutOfMemoryError)):
            return dead_process(rank, error, False)
    causes = {rank: cause_of(error) for rank, error in errors.items()}
    rank = next((rank for rank, cause in causes.items() if not is_lost_peer(cause)), next(iter(causes)))
    cause = causes[rank]
    kind, text = (
        (OUT_OF_MEMORY, str(cause)) if is_out_of_memory(cause) else (FAILED, f"{type(cause).__name__}: {cause}")
    )
    return Failure(kind, rank, text.strip().rstrip("."), errors[rank])


def dead_process(rank: int, error: RayError, system_killed: bool) -> Failure:
    """Return the failure of a rank whose process has ended, by Ray's error for it.

    `system_killed`: the system has killed a process to free memory.
    """
    kind = OUT_OF_MEMORY
    if isinstance(error, OutOfMemoryError):
        cause = "the memory of the machine was almost full, so Ray killed this worker's process"
    elif system_killed:
        cause = "the memory of the machine was full, and the system killed this worker's process"
    else:
        kind = DIED
        cause = (
            "its process ended without a trace: it crashed or was killed. "
            "When memory runs out, the system kills the largest process"
        )
    return Failure(kind, rank, cause, error)


def cause_of(error: BaseException) -> BaseException:
    """Return what was raised in the worker."""
    return error.cause if isinstance(error, RayTaskError) and error.cause is not None else error


def is_lost_peer(error: BaseException) -> bool:
    """Return whether it is an error that a rank meets because another has gone."""
    text = f"{type(error).__name__}: {error}".lower()
    marked = any(mark in text for mark in _LOST_PEER_MARKS)
    return marked and isinstance(error, RuntimeError) and not is_out_of_memory(error)


def is_store_full(error: BaseException) -> bool:
    """Return whether Ray's object store had no room."""
    return isinstance(cause_of(error), (ObjectStoreFullError, OutOfDiskError))


def store_full(what: str, error: BaseException) -> StoreFull:
    """Return the error for `what` having found no room in Ray's object store."""
    if isinstance(cause_of(error), OutOfDiskError):
        return StoreFull(
            f"Ray's object store is full, and so is the disk that it falls back on: no room for {what}. Free space on "
            f"the disk of Ray's temporary folder, or raise ray_object_store_gb of the advanced initializer"
        )
    return StoreFull(
        f"Ray's object store is full: no room for {what}. Raise ray_object_store_gb of the advanced initializer"
    )


def oom_kills() -> int:
    """Return how many processes the system has killed to free memory since it started, 0 if it does not say."""
    try:
        fields = dict(line.split() for line in _VMSTAT.read_text().splitlines())
    except OSError:
        return 0
    return int(fields.get("oom_kill", 0))
