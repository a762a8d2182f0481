"""Rows that a rank needs of others: halos, and the same rows under other cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from ..collectives import Splits, all_gather, start_exchange
from .layout import Cuts, Rows, Span
from .row_tensor import RowTensor, mixes, plain, position, wrap


def _overlap(first: Span, second: Span) -> Span | None:
    start, stop = max(first[0], second[0]), min(first[1], second[1])
    return (start, stop) if start < stop else None


def _missing(need: Span, held: Span) -> list[Span]:
    """Return the parts of `need` outside of `held`."""
    if _overlap(need, held) is None:
        return [need] if need[0] < need[1] else []
    parts = [(need[0], min(need[1], held[0])), (max(need[0], held[1]), need[1])]
    return [part for part in parts if part[0] < part[1]]


@lru_cache(maxsize=1024)
def _transfers(
    needs: tuple[Span, ...], held: tuple[Span, ...], own: tuple[Span, ...], rank: int
) -> tuple[bool, tuple[tuple[Span, ...], ...], tuple[tuple[Span, ...], ...]]:
    """Return whether any rank receives rows, and which ones `rank` sends to each rank and receives from it."""
    missing = [_missing(need, has) for need, has in zip(needs, held, strict=True)]

    def parts(of: Sequence[Span], span: Span) -> tuple[Span, ...]:
        return tuple(part for part in (_overlap(one, span) for one in of) if part)

    sent = tuple(parts(missing[other], own[rank]) if other != rank else () for other in range(len(own)))
    received = tuple(parts(missing[rank], own[other]) if other != rank else () for other in range(len(own)))
    return any(missing), sent, received


class Halo:
    """Rows on their way from other ranks. Collective: every rank makes it with the same `needs`.

    `needs[r]` are the rows that rank r needs, of which it receives what its tensor does not hold.
    """

    def __init__(self, tensor: RowTensor, needs: Sequence[Span]) -> None:
        rows, ranks = tensor.rows, tensor.ranks
        if rows.outer > 1:
            raise mixes("exchange", tensor, "its rows are flattened together with other dimensions")
        self._dim = position(rows, tensor)
        self._local = plain(tensor)
        spans = rows.spans
        self._need, self._held = needs[ranks.rank], spans[ranks.rank]
        self._work = None
        self._parts: list[tuple[Span, int]] = []
        is_needed, sent, received = _transfers(tuple(needs), spans, rows.cuts.spans, ranks.rank)
        if not is_needed:
            return
        row = self._local.numel() // max(1, self._local.shape[self._dim])  # elements

        def counts(of: tuple[tuple[Span, ...], ...]) -> tuple[int, ...]:
            return tuple(sum(stop - start for start, stop in parts) * row for parts in of)

        pieces = [
            self._local.narrow(self._dim, start - self._held[0], stop - start).reshape(-1)
            for start, stop in (part for parts in sent for part in parts)
        ]
        buffer = torch.cat(pieces) if pieces else self._local.new_empty(0)
        self._received, self._work = start_exchange(buffer, Splits(counts(sent), counts(received)), ranks.group)
        self._parts = [(part, (part[1] - part[0]) * row) for parts in received for part in parts]
        ranks.exchanges += 1
        ranks.received_bytes += self._received.numel() * self._received.element_size()

    def wait(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the received pieces above and below this rank's rows, each in the order of the image."""
        if self._work is None:
            return [], []
        self._work.wait()
        above, below, offset = [], [], 0
        for (start, stop), count in self._parts:  # by rank, so in the image's order
            shape = list(self._local.shape)
            shape[self._dim] = stop - start
            piece = self._received[offset : offset + count].view(shape)
            offset += count
            (above if start < self._held[0] else below).append(piece)
        return above, below

    def assembled(self, zeros_above: int = 0, zeros_below: int = 0, order: torch.memory_format | None = None) -> Tensor:
        """Return the rows of this rank's need between rows of zeros, (..., zeros + need + zeros, ...), in this order of
        memory if one is given: a view if that is what it holds, else a new tensor.
        """
        above, below = self.wait()
        start, stop = _overlap(self._need, self._held) or (self._held[0], self._held[0])
        middle = self._local.narrow(self._dim, start - self._held[0], stop - start)
        if not (above or below or zeros_above or zeros_below):
            return middle if order is None else middle.contiguous(memory_format=order)
        shape = list(middle.shape)
        shape[self._dim] = zeros_above + self._need[1] - self._need[0] + zeros_below
        full = torch.empty(
            shape, dtype=middle.dtype, device=middle.device, memory_format=order or torch.contiguous_format
        )
        at = 0
        for part in (zeros_above, *above, middle, *below, zeros_below):
            rows = part if isinstance(part, int) else part.shape[self._dim]
            if rows:
                place = full.narrow(self._dim, at, rows)
                place.zero_() if isinstance(part, int) else place.copy_(part)
                at += rows
        return full


def fetch(tensor: RowTensor, needs: Sequence[Span]) -> Tensor:
    """Return rows `needs[rank]` of the whole, (..., need, ...). Collective."""
    return Halo(tensor, needs).assembled()


def own(tensor: RowTensor) -> RowTensor:
    """Return a tensor without copies of other ranks' rows, as a view."""
    rows = tensor.rows
    if rows.held is None:
        return tensor
    (start, stop), (first, _) = rows.cuts.spans[tensor.ranks.rank], rows.held[tensor.ranks.rank]
    local = plain(tensor).narrow(position(rows, tensor), start - first, stop - start)
    return wrap(local, replace(rows, held=None), tensor.ranks)


def realigned(tensor: RowTensor, rows: Rows) -> RowTensor:
    """Return `tensor` cut as `rows` is. Collective if they differ.

    Raises RowsError: they are no rows of the same image.
    """
    mine = tensor.rows
    if mine.cuts == rows.cuts and mine.held == rows.held and mine.outer == rows.outer:
        return tensor
    if mine.cuts.total != rows.cuts.total or mine.outer > 1 or rows.outer > 1:
        raise mixes("align", tensor, f"{mine} beside {rows}")
    return wrap(fetch(tensor, rows.spans), replace(mine, cuts=rows.cuts, held=rows.held), tensor.ranks)


def gathered(tensor: RowTensor) -> Tensor:
    """Return the rows of all ranks, rank after rank: (..., local, ...) -> (..., full, ...). Collective.

    Where the dimension has an `outer` part, that is another order than the image's.
    """
    tensor = own(tensor)
    rows, ranks = tensor.rows, tensor.ranks
    sizes = [size * rows.outer for size in rows.cuts.sizes]
    full = all_gather(plain(tensor), sizes, position(rows, tensor), ranks.group)
    ranks.exchanges += 1
    ranks.received_bytes += (full.numel() - tensor.numel()) * full.element_size()
    return full


def recut(rows: Rows, cuts: Cuts) -> Rows:
    """Return `rows` with other cuts, and nothing held beside them."""
    return rows if rows.held is None and rows.cuts == cuts else replace(rows, cuts=cuts, held=None)
