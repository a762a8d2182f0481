"""The pulse of this rank: that it gets on, seen from outside, and where it may be stopped."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed import distributed_c10d

_beats = 0
_check: Callable[[], None] | None = None


def beat() -> None:
    """Say that this rank gets on. Called where ranks meet."""
    global _beats
    _beats += 1


def beats() -> int:
    """How often `beat` was called in this process: what stands still, hangs."""
    return _beats


def cancellation_point() -> None:
    """A place where all ranks may agree to stop. Collective: every rank comes to the same ones in the same order.

    Raises what the caller of `cancellation_checked_by` had raised; does nothing outside of it.
    """
    beat()
    if _check is not None:
        _check()


@contextmanager
def cancellation_checked_by(check: Callable[[], None]):
    """Within it, `cancellation_point` calls `check`."""
    global _check
    before, _check = _check, check
    try:
        yield
    finally:
        _check = before


Tally = dict[tuple[str, ...], int]


def begun() -> Tally | None:
    """What each group of this process has begun since it was made, by name, members and device.

    PyTorch counts every collective, whoever calls it; NCCL's count leaves out sends between two ranks. None where this
    version of PyTorch does not tell.
    """
    if not dist.is_initialized():
        return {}
    try:
        return {
            (name, str(dist.get_process_group_ranks(group)), str(device)): group._get_backend(
                device
            )._get_sequence_number_for_group()
            for group, name in dict(distributed_c10d._world.pg_names).items()
            if isinstance(group, dist.ProcessGroup)
            for device in group._device_types
        }
    except (AttributeError, RuntimeError):
        return None


def agree(tallies: list[Tally | None]) -> bool:
    """Whether each group stands at one number on all of its ranks, of which `tallies` has one for each."""
    if any(tally is None for tally in tallies):
        return False
    numbers: dict[tuple[str, ...], set[int]] = {}
    for tally in tallies:
        for group, number in tally.items():
            numbers.setdefault(group, set()).add(number)
    return all(len(of_group) == 1 for of_group in numbers.values())
