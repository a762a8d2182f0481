"""How heads and tokens lie in the buffers of an exchange: each element is copied once on its way out and, of queries,
keys and values, not at all on its way in.

Rows of a buffer are tokens. What ranks send is laid end to end by the collective, so the tokens of all of them are one
tensor as they arrive, and attention reads it in place, by strides.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .partition import offsets, partition

Heads = tuple[int, int]  # the first, and one behind the last


@dataclass(frozen=True, slots=True)
class Chunk:
    """One part of an exchange: of each rank its query heads, and the key heads that these need."""

    queries: tuple[Heads, ...]
    keys: tuple[Heads, ...]


@functools.cache
def chunks_of(heads: int, group: int, ranks: int, count: int) -> tuple[Chunk, ...]:
    """An exchange of `heads` in at most `count` parts, in each of which every rank has heads. `group` query heads have
    one key head in common; where a group lies on two ranks, both get its key head."""
    split = partition(heads, ranks)
    count = min(count, min(split))
    result = []
    for part in range(count):
        queries = []
        for first, own in zip(offsets(split), split, strict=True):
            pieces = partition(own, count)
            start = first + offsets(pieces)[part]
            queries.append((start, start + pieces[part]))
        result.append(
            Chunk(tuple(queries), tuple((start // group, (stop - 1) // group + 1) for start, stop in queries))
        )
    return tuple(result)


def packed_heads(tensors: Sequence[Tensor], ranges: Sequence[tuple[Heads, ...]]) -> tuple[Tensor, list[int]]:
    """The heads of several tensors (B, heads, S, D) for each rank, in one buffer.

    `ranges[i][d]` are the heads of tensor i for rank d. For each rank the buffer holds (S, B, its heads x D of all
    tensors); returns it, and how many elements each rank's piece has.
    """
    batch, _, tokens, _ = tensors[0].shape
    widths = [
        [(stop - start) * tensor.shape[3] for start, stop in of_tensor]
        for tensor, of_tensor in zip(tensors, ranges, strict=True)
    ]
    counts = [batch * tokens * sum(of_rank) for of_rank in zip(*widths, strict=True)]
    buffer = tensors[0].new_empty(sum(counts))
    if not tokens:
        return buffer, counts
    if all(_evenly(of_tensor, tensor.shape[1]) for tensor, of_tensor in zip(tensors, ranges, strict=True)):
        rows = buffer.view(len(counts), tokens, batch, -1).split([of_tensor[0] for of_tensor in widths], -1)
        for part, tensor, of_tensor in zip(rows, tensors, ranges, strict=True):
            start, stop = of_tensor[0]
            whole = tensor.unflatten(1, (len(counts), -1))[:, :, start:stop]
            _copy(part.unflatten(-1, (stop - start, -1)), whole.permute(1, 3, 0, 2, 4))
        return buffer, counts
    for rank, piece in enumerate(buffer.split(counts)):
        rows = piece.view(tokens, batch, -1).split([of_tensor[rank] for of_tensor in widths], -1)
        for part, tensor, of_tensor in zip(rows, tensors, ranges, strict=True):
            start, stop = of_tensor[rank]
            _copy(part.unflatten(-1, (stop - start, -1)), tensor[:, start:stop].permute(2, 0, 1, 3))
    return buffer, counts


def unpacked_heads(buffer: Tensor, tokens: int, batch: int, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Views (B, heads, S, D) of a buffer (S, B, heads x D of several tensors), whose heads and D are `sizes`."""
    widths = [heads * width for heads, width in sizes]
    rows = buffer.view(tokens, batch, sum(widths)).split(widths, -1)
    return [row.unflatten(-1, size).permute(1, 2, 0, 3) for row, size in zip(rows, sizes, strict=True)]


def packed_tokens(out: Tensor) -> Tensor:
    """(B, heads, S, D) as a buffer (S, B, heads, D), in which each rank's tokens lie together. No copy where attention
    wrote tokens one after the other, as it does for queries that lie so, and the batch is one."""
    return out.permute(2, 0, 1, 3).contiguous().view(-1)


def place_heads(buffer: Tensor, ranges: tuple[Heads, ...], out: Tensor) -> None:
    """Copy what ranks send back into `out` (B, S, H, D): of rank d heads `ranges[d]`, as (S, B, heads, D)."""
    batch, tokens, heads, width = out.shape
    if not tokens:
        return
    if _evenly(ranges, heads):
        start, stop = ranges[0]
        pieces = buffer.view(len(ranges), tokens, batch, stop - start, width)
        _copy(out.unflatten(2, (len(ranges), -1))[:, :, :, start:stop], pieces.permute(2, 1, 0, 3, 4))
        return
    counts = [batch * tokens * (stop - start) * width for start, stop in ranges]
    for piece, (start, stop) in zip(buffer.split(counts), ranges, strict=True):
        _copy(out[:, :, start:stop], piece.view(tokens, batch, stop - start, width).permute(1, 0, 2, 3))


@functools.cache
def _evenly(ranges: tuple[Heads, ...], heads: int) -> bool:
    """Whether every rank has the same part of its equal share of `heads`: these are copied at once."""
    share, rest = divmod(heads, len(ranges))
    start, stop = ranges[0]
    return (
        rest == 0
        and stop <= share
        and all(of_rank == (start + rank * share, stop + rank * share) for rank, of_rank in enumerate(ranges))
    )


def _copy(to: Tensor, source: Tensor) -> None:
    """Copy by words of 8 bytes where rows allow it: a strided copy moves one element at a time."""
    words = 8 // to.element_size()
    if words > 1 and all(_in_words(t, words) for t in (to, source)):
        to, source = to.view(torch.int64), source.view(torch.int64)
    to.copy_(source)


def _in_words(tensor: Tensor, words: int) -> bool:
    return (
        tensor.stride(-1) == 1
        and tensor.shape[-1] % words == 0
        and tensor.storage_offset() % words == 0
        and all(stride % words == 0 for stride in tensor.stride()[:-1])
    )
