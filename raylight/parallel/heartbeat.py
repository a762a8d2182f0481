"""Signs of this rank's progress: heartbeats, the collectives it has begun, what its GPU has done, and points where it
can be cancelled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
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


class Mark(Protocol):
    """What a GPU reaches when it has done all that was launched before, as `torch.cuda.Event`."""

    def query(self) -> bool:
        """Return whether it is reached."""
        ...


_marks: deque[Mark] = deque(maxlen=1 << 14)  # that the GPU has not reached yet; without the oldest of too many
_launched = _reached = 0


def launched(device: torch.device) -> None:
    """Record that this rank has launched a part of a forward on a device. Unlike `beat` it may be called more often on
    one rank than on another. On a GPU it costs the host about 10 us.

    A host launches in seconds what a GPU may compute for many minutes, and then waits for it.
    """
    global _launched
    if torch.compiler.is_compiling():  # which would look into this
        return
    _launched += 1
    if (mark := _mark_on(device)) is not None:
        _marks.append(mark)


def _mark_on(device: torch.device) -> Mark | None:
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():  # a graph's marks are reached by no replay
        return None
    mark = torch.cuda.Event()
    mark.record(torch.cuda.current_stream(device))
    return mark


def progress() -> int:
    """Return a number that grows while this rank makes progress: its host, or its GPU alone. It is not that of other
    ranks. One thread may ask.
    """
    global _reached
    try:
        while _marks and _marks[0].query():
            _marks.popleft()
            _reached += 1
    except RuntimeError:  # CUDA is broken: the rank's work meets that error by itself
        _marks.clear()
    return _beats + _launched + _reached


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
