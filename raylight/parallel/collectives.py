"""Collectives over shards of uneven size. Every rank knows all sizes, so none is ever exchanged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .heartbeat import beat


class Simulated:
    """Stands in for a process group where one process goes through the part of one rank by itself."""


# torch 2.14 has the new name and deprecates the old one; earlier versions have only the old one.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True, slots=True)
class Splits:
    """How many elements an all-to-all sends to each rank, and receives from each."""

    sends: tuple[int, ...]
    receives: tuple[int, ...]
    equal: bool = False  # all of them, on every rank: then they need not be passed, which costs the host more

    @property
    def lists(self) -> tuple[list[int] | None, list[int] | None]:
        """The sizes received and sent, as PyTorch takes them."""
        return (None, None) if self.equal else (list(self.receives), list(self.sends))


def exchange(sent: Tensor, splits: Splits, group: dist.ProcessGroup) -> Tensor:
    """Exchange the elements of `sent`, contiguous, which has those for each rank of the group in order. Collective.

    Return the received tensor (elements,) of the same dtype, in the order of the ranks. On a GPU this runs in the
    current stream, which costs the host less than `start_exchange`.
    """
    beat()
    received = sent.new_empty(sum(splits.receives))
    dist.all_to_all_single(received, sent.view(-1), *splits.lists, group=group)
    return received


def start_exchange(sent: Tensor, splits: Splits, group: dist.ProcessGroup) -> tuple[Tensor, dist.Work]:
    """As `exchange`, beside the computation. Return the work to wait for first, too."""
    beat()
    received = sent.new_empty(sum(splits.receives))
    work = dist.all_to_all_single(received, sent.view(-1), *splits.lists, group=group, async_op=True)
    assert work is not None, "an exchange without its end to wait for"
    return received, work


def all_gather(local: Tensor, sizes: Sequence[int], dim: int, group: dist.ProcessGroup | Simulated | None) -> Tensor:
    """Concatenate the ranks' shards along `dim`, where rank r has size `sizes[r]`. Collective.

    (..., sizes[rank], ...) -> (..., sum(sizes), ...), contiguous, of the same dtype. Shorter shards are sent padded to
    the longest, because an all-gather of equal sizes is the one form that every backend has. In a simulated group there
    are zeros in the place of all shards.
    """
    beat()
    if isinstance(group, Simulated):
        return local.new_zeros(*local.shape[:dim], sum(sizes), *local.shape[dim:][1:])
    longest = max(sizes)
    shard = local.movedim(dim, 0)  # (sizes[rank], ...)
    if shard.shape[0] < longest:
        shard = torch.cat([shard, shard.new_zeros(longest - shard.shape[0], *shard.shape[1:])])
    shard = shard.contiguous()  # (longest, ...)
    gathered = shard.new_empty(len(sizes) * longest, *shard.shape[1:])
    all_gather_single(gathered, shard, group=group)
    shards = [padded[:size] for padded, size in zip(gathered.split(longest), sizes, strict=True)]
    # Contiguous, since a model may call `view` on it, as it could on its own output.
    return torch.cat(shards).movedim(0, dim).contiguous()
