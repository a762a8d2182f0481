"""How many collectives this rank has begun, by group: ranks with the same numbers wait for nobody."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed import distributed_c10d

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
            (name, str(dist.get_process_group_ranks(group)), str(device)):
                group._get_backend(device)._get_sequence_number_for_group()
            for group, name in dict(distributed_c10d._world.pg_names).items()
            if isinstance(group, dist.ProcessGroup) for device in group._device_types
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
