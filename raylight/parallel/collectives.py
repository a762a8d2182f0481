"""Collectives over shards of uneven size. Every rank knows all sizes, so none is ever exchanged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .heartbeat import beat

# torch 2.14 has the new name and deprecates the old one; earlier versions have only the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def start_exchange(
    sent: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], group: dist.ProcessGroup
) -> tuple[Tensor, dist.Work]:
    """Start an all-to-all that runs beside the computation. Collective.

    `sent` (elements,) has `send_counts[r]` elements for each rank r of the group, in order. Return the received tensor
    (elements,) of the same dtype, with `receive_counts[r]` elements from each rank r, and the work to wait for first.
    """
    beat()
    received = sent.new_empty(sum(receive_counts))
    work = dist.all_to_all_single(received, sent, list(receive_counts), list(send_counts), group=group, async_op=True)
    assert work is not None, "an exchange without its end to wait for"
    return received, work


def all_gather(local: Tensor, sizes: Sequence[int], dim: int, group: dist.ProcessGroup | None) -> Tensor:
    """Concatenate the ranks' shards along `dim`, where rank r has size `sizes[r]`. Collective.

    (..., sizes[rank], ...) -> (..., sum(sizes), ...), contiguous, of the same dtype. Shorter shards are sent padded to
    the longest, because an all-gather of equal sizes is the one form that every backend has.
    """
    beat()
    longest = max(sizes)
    shard = local.movedim(dim, 0)  # (sizes[rank], ...)
    if shard.shape[0] < longest:
        shard = torch.cat([shard, shard.new_zeros(longest - shard.shape[0], *shard.shape[1:])])
    shard = shard.contiguous()  # (longest, ...)
    gathered = shard.new_empty(len(sizes) * longest, *shard.shape[1:])
    _all_gather(gathered, shard, group=group)
    shards = [padded[:size] for padded, size in zip(gathered.split(longest), sizes, strict=True)]
    # Contiguous, since a model may call `view` on it, as it could on its own output.
    return torch.cat(shards).movedim(0, dim).contiguous()
