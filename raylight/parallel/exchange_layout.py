"""The layout of heads and tokens in the buffers of an all-to-all.

Each element is copied once into a sent buffer; received queries, keys and values are not copied at all. The first
dimension of a received buffer is tokens: the collective concatenates what the ranks send, so the tokens of all ranks
are one tensor, which attention reads in place, by strides.

What depends on sizes only is computed once and kept: a model makes the same call in every block.

Shapes as in `ulysses`: B batch rows, H heads, D head size, S_LOCAL tokens of this rank, S of all ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .partition import divide, offsets, partition
from .shares import Weights

HeadRange = tuple[int, int]  # start, stop

# Up to here one kernel that reads three tensors is faster than three kernels, by what a launch costs.
SMALL_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk of an exchange: each rank's query heads, and the key heads that these need."""

    queries: tuple[HeadRange, ...]
    keys: tuple[HeadRange, ...]


@functools.cache
def head_chunks(heads: int, group: int, ranks: int, count: int, weights: Weights = ()) -> tuple[Chunk, ...]:
    """Divide an exchange of `heads` query heads into at most `count` chunks, in each of which every rank has heads, in
    proportion to `weights` if there are any.

    `group` query heads share one key head; if a group lies on two ranks, both get its key head.

    >>> head_chunks(heads=6, group=3, ranks=2, count=1)
    (Chunk(queries=((0, 3), (3, 6)), keys=((0, 1), (1, 2))),)
    """
    of_ranks = divide(heads, ranks, weights)
    count = min(count, min(of_ranks))
    result = []
    for chunk in range(count):
        queries = []
        for first, own in zip(offsets(of_ranks), of_ranks, strict=True):
            sizes = partition(own, count)
            start = first + offsets(sizes)[chunk]
            queries.append((start, start + sizes[chunk]))
        keys = tuple((start // group, (stop - 1) // group + 1) for start, stop in queries)
        result.append(Chunk(tuple(queries), keys))
    return tuple(result)


def pack_heads(tensors: Sequence[Tensor], ranges: Sequence[tuple[HeadRange, ...]]) -> Tensor:
    """Copy the heads that each rank gets of several tensors (B, heads, S_LOCAL, D) into one contiguous buffer.

    `ranges[i][r]` are the heads of tensor i for rank r. For each rank the buffer has (S_LOCAL, B, its heads * D of all
    tensors). Its shape is any, and its dtype the tensors' or int64.
    """
    batch, _, tokens, width = tensors[0].shape
    ranks = len(ranges[0])
    even = all(_are_even(of_tensor, tensor.shape[1]) for tensor, of_tensor in zip(tensors, ranges, strict=True))
    if even and batch == 1 and tokens and all(tensor.shape[3] == width for tensor in tensors):
        slots = [_heads_of_ranks(*one) for one in zip(_in_words(*tensors), ranges, strict=True)]
        if sum(slot.numel() * slot.itemsize for slot in slots) <= SMALL_BYTES:  # no `nbytes`: it cannot be compiled
            # one kernel for all: (ranks, S_LOCAL, heads, D) of each tensor -> (ranks, S_LOCAL, heads of all, D)
            return torch.cat(slots, 2)
    widths = [
        [(stop - start) * tensor.shape[3] for start, stop in of_tensor]
        for tensor, of_tensor in zip(tensors, ranges, strict=True)
    ]
    counts = [batch * tokens * sum(of_rank) for of_rank in zip(*widths, strict=True)]
    buffer = tensors[0].new_empty(sum(counts))
    if not tokens:
        return buffer
    if even:
        # All ranks at once: (ranks, S_LOCAL, B, heads * D of all tensors), split into tensors
        slots = buffer.view(ranks, tokens, batch, -1).split([of_tensor[0] for of_tensor in widths], -1)
        for slot, tensor, of_tensor in zip(slots, tensors, ranges, strict=True):
            start, stop = of_tensor[0]
            heads = tensor.unflatten(1, (ranks, -1))[:, :, start:stop]  # (B, ranks, heads, S_LOCAL, D)
            _copy(slot.unflatten(-1, (stop - start, -1)), heads.permute(1, 3, 0, 2, 4))
        return buffer
    for rank, of_rank in enumerate(buffer.split(counts)):
        slots = of_rank.view(tokens, batch, -1).split([of_tensor[rank] for of_tensor in widths], -1)
        for slot, tensor, of_tensor in zip(slots, tensors, ranges, strict=True):
            start, stop = of_tensor[rank]
            # (B, heads, S_LOCAL, D) -> (S_LOCAL, B, heads, D)
            _copy(slot.unflatten(-1, (stop - start, -1)), tensor[:, start:stop].permute(2, 0, 1, 3))
    return buffer


def _heads_of_ranks(tensor: Tensor, ranges: tuple[HeadRange, ...]) -> Tensor:
    """Return a view of (1, H, S_LOCAL, D): (ranks, S_LOCAL, heads, D), with ranges that are even."""
    _, heads, tokens, width = tensor.shape
    _, of_head, of_token, of_element = tensor.stride()
    start, stop = ranges[0]
    return tensor.as_strided(
        (len(ranges), tokens, stop - start, width),
        (heads // len(ranges) * of_head, of_token, of_head, of_element),
        tensor.storage_offset() + start * of_head,
    )


def unpack_heads(buffer: Tensor, tokens: int, batch: int, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Return views of a flat buffer (S, B, heads * D of several tensors): of each tensor (B, heads, S, D).

    `sizes` are (heads, D) of each tensor.
    """
    of_row = sum(heads * width for heads, width in sizes)
    views, offset = [], buffer.storage_offset()
    for heads, width in sizes:
        size, stride = (batch, heads, tokens, width), (of_row, width, batch * of_row, 1)
        views.append(buffer.as_strided(size, stride, offset))
        offset += heads * width
    return views


def pack_tokens(out: Tensor) -> Tensor:
    """(B, heads, S, D) -> contiguous (S, B, heads, D), in which each rank's tokens are contiguous.

    Copies nothing if attention wrote tokens one after the other, as it does for queries in that layout, and B is 1.
    """
    return out.permute(2, 0, 1, 3).contiguous()


def place_all_heads(
    buffer: Tensor, dtype: torch.dtype, ranges: tuple[HeadRange, ...], shape: tuple[int, int, int, int]
) -> Tensor:
    """Return (B, S_LOCAL, H, D) of this `shape` and dtype from a flat buffer, of any dtype, with (S_LOCAL, B, heads
    `ranges[r]`, D) from each rank r: all heads.
    """
    batch, tokens, heads, _ = shape
    if batch > 1 or not tokens or not _are_even(ranges, heads):
        out = torch.empty(shape, dtype=dtype, device=buffer.device)
        place_heads(buffer.view(dtype), ranges, out)
        return out
    row = buffer.numel() // (tokens * len(ranges))
    # (ranks, S_LOCAL, heads * D) -> (S_LOCAL, ranks, heads * D)
    placed = buffer.as_strided((tokens, len(ranges), row), (row, tokens * row, 1)).contiguous()
    return placed.view(dtype).view(shape)


def place_heads(buffer: Tensor, ranges: tuple[HeadRange, ...], out: Tensor) -> None:
    """Copy a flat buffer with (S_LOCAL, B, heads `ranges[r]`, D) from each rank r into `out` (B, S_LOCAL, H, D)."""
    batch, tokens, heads, width = out.shape
    if not tokens:
        return
    if _are_even(ranges, heads):
        start, stop = ranges[0]
        received = buffer.view(len(ranges), tokens, batch, stop - start, width)
        _copy(out.unflatten(2, (len(ranges), -1))[:, :, :, start:stop], received.permute(2, 1, 0, 3, 4))
        return
    counts = [batch * tokens * (stop - start) * width for start, stop in ranges]
    for of_rank, (start, stop) in zip(buffer.split(counts), ranges, strict=True):
        _copy(out[:, :, start:stop], of_rank.view(tokens, batch, stop - start, width).permute(1, 0, 2, 3))


@functools.cache
def _are_even(ranges: tuple[HeadRange, ...], heads: int) -> bool:
    """Return whether all ranks have equally many heads, and the same range of theirs: one copy then serves all."""
    own, rest = divmod(heads, len(ranges))
    start, stop = ranges[0]
    return (
        rest == 0
        and stop <= own
        and all(of_rank == (start + rank * own, stop + rank * own) for rank, of_rank in enumerate(ranges))
    )


def _copy(to: Tensor, source: Tensor) -> None:
    """Copy in words of 8 bytes if the layout allows it: a strided copy moves one element at a time."""
    to, source = _in_words(to, source)
    to.copy_(source)


def _in_words(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the same memory as words of 8 bytes if the layout of all tensors, of one dtype, allows it."""
    words = 8 // tensors[0].element_size()
    if words > 1 and all(_is_in_words(t.shape[-1], t.stride(), t.storage_offset(), words) for t in tensors):
        return tuple(t.view(torch.int64) for t in tensors)
    return tensors


@functools.lru_cache(maxsize=1024)
def _is_in_words(length: int, strides: tuple[int, ...], offset: int, words: int) -> bool:
    return (
        strides[-1] == 1
        and length % words == 0
        and offset % words == 0
        and all(stride % words == 0 for stride in strides[:-1])
    )
