"""Collectives over pieces of uneven size. Sizes are always known to every rank, so none is ever exchanged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .heartbeat import beat

# torch 2.14 has the new name and warns of the old one; earlier versions have the old one only.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def start_exchange(
    sent: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], group: dist.ProcessGroup
) -> tuple[Tensor, dist.Work]:
    """Begin an all-to-all beside the computation; what arrives is there after `wait` of the work.

    `sent` (elements,) holds `send_counts[d]` elements for rank d of the group, one after the other; the result holds
    `receive_counts[s]` elements of rank s likewise.
    """
    beat()
    received = sent.new_empty(sum(receive_counts))
    work = dist.all_to_all_single(received, sent, list(receive_counts), list(send_counts), group=group, async_op=True)
    return received, work


def all_gather(local: Tensor, sizes: Sequence[int], dim: int, group: dist.ProcessGroup) -> Tensor:
    """Join the ranks' pieces along `dim`; rank r's piece has `sizes[r]` rows there.

    Shorter pieces travel padded to the longest, because an all-gather of equal pieces is the one
    form that every backend has.
    """
    beat()
    longest = max(sizes)
    rows = local.movedim(dim, 0)
    if rows.shape[0] < longest:
        rows = torch.cat([rows, rows.new_zeros(longest - rows.shape[0], *rows.shape[1:])])
    rows = rows.contiguous()
    gathered = rows.new_empty(len(sizes) * longest, *rows.shape[1:])
    _all_gather(gathered, rows, group=group)
    pieces = [block[:size] for block, size in zip(gathered.split(longest), sizes, strict=True)]
    # A model may view what it gets, as it could its own output.
    return torch.cat(pieces).movedim(0, dim).contiguous()
