"""Collectives over pieces of uneven size. Sizes are always known to every rank, so none is ever exchanged."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .pulse import beat

# torch 2.14 has the new name and warns of the old one; earlier versions have the old one only.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def exchange(pieces: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[tuple[int, ...]]],
             group: dist.ProcessGroup) -> list[list[Tensor]]:
    """All-to-all of several tensors in one collective.

    `pieces[d]` are the tensors for rank d of the group; `shapes[s]` are the shapes of those that rank s sends here.
    Returns the received tensors, by sender. All tensors have one dtype and device.
    """
    beat()
    flat = [torch.cat([t.reshape(-1) for t in row]) for row in pieces]
    send_counts = [t.numel() for t in flat]
    counts = [[math.prod(shape) for shape in row] for row in shapes]
    receive_counts = [sum(row) for row in counts]
    received = flat[0].new_empty(sum(receive_counts))
    dist.all_to_all_single(received, torch.cat(flat), receive_counts, send_counts, group=group)
    result = []
    for block, row_counts, row_shapes in zip(received.split(receive_counts), counts, shapes, strict=True):
        result.append([t.view(shape) for t, shape in zip(block.split(row_counts), row_shapes, strict=True)])
    return result


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
