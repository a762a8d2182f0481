"""How heads and tokens lie in the buffers of an exchange: each element is copied once on its way out and, of queries,
keys and values, not at all on its way in.

Rows of a buffer are tokens. What ranks send is laid end to end by the collective, so the tokens of all of them are one
tensor as they arrive, and attention reads it in place, by strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .partition import offsets, partition


@dataclass(frozen=True, slots=True)
class Share:
    """Query heads `start` to `stop` and the key heads that they need, of one rank and one part of the exchange."""

    start: int
    stop: int
    key_start: int
    key_stop: int

    @property
    def heads(self) -> int:
        return self.stop - self.start

    @property
    def key_heads(self) -> int:
        return self.key_stop - self.key_start


def shares(heads: int, group: int, ranks: int, parts: int) -> list[tuple[Share, ...]]:
    """For each part of an exchange the share of every rank. `group` query heads have one key head in common; where a
    group lies on two ranks, both get its key head."""
    split = partition(heads, ranks)
    parts = min(parts, min(split))
    result = []
    for part in range(parts):
        of_part = []
        for first, count in zip(offsets(split), split, strict=True):
            pieces = partition(count, parts)
            start = first + offsets(pieces)[part]
            stop = start + pieces[part]
            of_part.append(Share(start, stop, start // group, (stop - 1) // group + 1))
        result.append(tuple(of_part))
    return result


def packed_heads(tensors: Sequence[Tensor], ranges: Sequence[Sequence[tuple[int, int]]]) -> tuple[Tensor, list[int]]:
    """The heads of several tensors (B, heads, S, D) for each rank, in one buffer.

    `ranges[d][i]` are the heads of tensor i for rank d. For each rank the buffer holds (S, B, its heads x D of all
    tensors); returns it, and how many elements each rank's piece has.
    """
    batch, _, tokens, _ = tensors[0].shape
    widths = [[(stop - start) * t.shape[3] for t, (start, stop) in zip(tensors, of_rank, strict=True)]
              for of_rank in ranges]
    counts = [batch * tokens * sum(row) for row in widths]
    buffer = tensors[0].new_empty(sum(counts))
    for piece, of_rank, row in zip(buffer.split(counts), ranges, widths, strict=True):
        for part, tensor, (start, stop) in zip(piece.view(tokens, batch, -1).split(row, -1), tensors, of_rank,
                                               strict=True):
            _copy(part.unflatten(-1, (stop - start, -1)), tensor[:, start:stop].permute(2, 0, 1, 3))
    return buffer, counts


def unpacked_heads(buffer: Tensor, tokens: int, batch: int, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Views (B, heads, S, D) of a buffer (S, B, heads x D of several tensors), whose heads and D are `sizes`."""
    rows = buffer.view(tokens, batch, -1).split([heads * width for heads, width in sizes], -1)
    return [row.unflatten(-1, size).permute(1, 2, 0, 3) for row, size in zip(rows, sizes, strict=True)]


def packed_tokens(out: Tensor) -> Tensor:
    """(B, heads, S, D) as a buffer (S, B, heads, D), in which each rank's tokens lie together. No copy where attention
    wrote tokens one after the other, as it does for queries that lie so, and the batch is one."""
    return out.permute(2, 0, 1, 3).contiguous().view(-1)


def place_heads(buffer: Tensor, ranges: Sequence[tuple[int, int]], out: Tensor) -> None:
    """Copy what ranks send back into `out` (B, S, H, D): of rank d heads `ranges[d]`, as (S, B, heads, D)."""
    batch, tokens, _, width = out.shape
    counts = [batch * tokens * (stop - start) * width for start, stop in ranges]
    for piece, (start, stop) in zip(buffer.split(counts), ranges, strict=True):
        _copy(out[:, :, start:stop], piece.view(tokens, batch, stop - start, width).permute(1, 0, 2, 3))


def _copy(to: Tensor, source: Tensor) -> None:
    """Copy by words of 8 bytes where rows allow it: a strided copy moves one element at a time."""
    words = 8 // to.element_size()
    if words > 1 and all(_in_words(t, words) for t in (to, source)):
        to, source = to.view(torch.int64), source.view(torch.int64)
    to.copy_(source)


def _in_words(tensor: Tensor, words: int) -> bool:
    return (tensor.stride(-1) == 1 and tensor.shape[-1] % words == 0 and tensor.storage_offset() % words == 0
            and all(stride % words == 0 for stride in tensor.stride()[:-1]))
