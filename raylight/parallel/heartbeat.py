"""Signs of this rank's progress: heartbeats, the collectives it has begun, and points where it can be cancelled."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

_beats = 0
_check: Callable[[], object] | None = None


def beat() -> None:
    """Record that this rank makes progress. Called at every collective."""
    global _beats
    _beats += 1


def beats() -> int:
    """Return how often this process has called `beat`. A number that stops growing means that the rank hangs."""
    return _beats


def cancellation_point() -> None:
    """Stop here if the ranks have agreed to cancel. Collective: every rank reaches the same points in the same order.

    Does nothing outside of `cancellation_checked_by`, and raises what its `check` raises.
    """
    beat()
    if _check is not None:
        _check()


@contextmanager
def cancellation_checked_by(check: Callable[[], object]):
    """Make every `cancellation_point` call `check` within this context."""
    global _check
    before, _check = _check, check
    try:
        yield
    finally:
        _check = before


Tally = dict[tuple[str, ...], int]  # collectives begun, by the group's name, ranks and device

_of_graphs: Tally = {}  # collectives of replays, less those of captures, of which PyTorch counts only the latter


def begun() -> Tally | None:
    """Return how many collectives each process group has begun since it was created.

    PyTorch counts every collective, whoever calls it; NCCL's count omits sends between two ranks. None if this version
    of PyTorch does not report the count.
    """
    if not dist.is_initialized():
        return {}
    try:
        counted = {
            (name, str(dist.get_process_group_ranks(group)), str(device)): _sequence_number(group, device)
            for group, name in dict(distributed_c10d._world.pg_names).items()
            if isinstance(group, dist.ProcessGroup)
            for device in group._device_types
        }
    except (AttributeError, RuntimeError):
        return None
    return {group: count + _of_graphs.get(group, 0) for group, count in counted.items()}


@dataclass(frozen=True, slots=True)
class Signs:
    """Heartbeats, and collectives that each group has begun, None if they are not known."""

    beats: int
    begun: Tally | None


def signs() -> Signs:
    """Return this rank's signs of progress so far."""
    return Signs(_beats, begun())


def take_back(before: Signs) -> Signs:
    """Count no sign since `before`, as they were those of a capture, which runs nothing; return them, for `repeat`."""
    earlier, now = before.begun, begun()
    new = {} if earlier is None or now is None else {group: now[group] - earlier.get(group, 0) for group in now}
    captured = Signs(_beats - before.beats, {group: count for group, count in new.items() if count})
    _count(captured, -1)
    return captured


def repeat(captured: Signs) -> None:
    """Count the signs of a graph that is replayed, so that this rank has as many as one that runs without."""
    _count(captured, 1)


def _count(captured: Signs, times: int) -> None:
    global _beats
    _beats += times * captured.beats
    for group, count in (captured.begun or {}).items():
        _of_graphs[group] = _of_graphs.get(group, 0) + times * count


def _sequence_number(group: Any, device: Any) -> int:
    return group._get_backend(device)._get_sequence_number_for_group()


def agree(tallies: list[Tally | None]) -> bool:
    """Return whether all ranks of each group have begun the same number of collectives; `tallies` are the ranks'."""
    counts: dict[tuple[str, ...], int] = {}
    return all(
        tally is not None and all(counts.setdefault(group, count) == count for group, count in tally.items())
        for tally in tallies
    )
