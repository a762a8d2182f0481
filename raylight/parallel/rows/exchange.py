"""Rows that a rank needs of others: halos, and the same rows under other cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ..collectives import Splits, all_gather, start_exchange
from .layout import Cuts, Rows, Span
from .row_tensor import RowTensor, mixes, plain, position, wrap
from .strips import Strips, as_strips, packed, strips_of


def _overlap(first: Span, second: Span) -> Span | None:
    start, stop = max(first[0], second[0]), min(first[1], second[1])
    return (start, stop) if start < stop else None


def _missing(need: Span, held: Span) -> list[Span]:
    """Return the parts of `need` outside of `held`."""
    if _overlap(need, held) is None:
        return [need] if need[0] < need[1] else []
    parts = [(need[0], min(need[1], held[0])), (max(need[0], held[1]), need[1])]
    return [part for part in parts if part[0] < part[1]]


@dataclass(frozen=True, slots=True)
class _Transfers:
    """What a rank sends and receives: how many rows to and from each rank, and which ones, in the order of the ranks.

    Those sent are counted from the first row of the rank's tensor, those received from the first one that it needs.
    """

    sends: tuple[int, ...]
    receives: tuple[int, ...]
    sent: tuple[Strips, ...]
    received: tuple[Strips, ...]


@lru_cache(maxsize=1024)
def _transfers(needs: tuple[Span, ...], held: tuple[Span, ...], own: tuple[Span, ...], rank: int) -> _Transfers | None:
    """Return what `rank` sends and receives, or None if no rank needs rows."""
    missing = [_missing(need, has) for need, has in zip(needs, held, strict=True)]
    if not any(missing):
        return None

    def parts(of: Sequence[Span], span: Span) -> list[Span]:
        return [part for part in (_overlap(one, span) for one in of) if part]

    sent = [parts(missing[other], own[rank]) if other != rank else [] for other in range(len(own))]
    received = [parts(missing[rank], own[other]) if other != rank else [] for other in range(len(own))]
    sends, receives = (tuple(sum(stop - start for start, stop in one) for one in of) for of in (sent, received))
    leaving, coming = ([part for one in of for part in one] for of in (sent, received))
    return _Transfers(sends, receives, as_strips(leaving, held[rank][0]), as_strips(coming, needs[rank][0]))


class Halo:
    """Rows on their way from other ranks. Collective: every rank makes it with the same `needs` and `order`.

    `needs[r]` are the rows that rank r needs, of which it receives what its tensor does not hold. They travel in the
    `order` of memory, contiguous if it is None, whichever one the ranks' tensors have.
    """

    def __init__(self, tensor: RowTensor, needs: Sequence[Span], order: torch.memory_format | None = None) -> None:
        rows, ranks = tensor.rows, tensor.ranks
        if rows.outer > 1:
            raise mixes("exchange", tensor, "its rows are flattened together with other dimensions")
        self._dim, self._order = position(rows, tensor), order
        self._local = plain(tensor)
        spans = rows.spans
        self._need, self._held = needs[ranks.rank], spans[ranks.rank]
        self._work = None
        transfers = _transfers(tuple(needs), spans, rows.cuts.spans, ranks.rank)
        if transfers is None:
            return
        row = self._local.numel() // max(1, self._local.shape[self._dim])  # elements
        splits = Splits(tuple(n * row for n in transfers.sends), tuple(n * row for n in transfers.receives))
        buffer = self._local.new_empty(sum(splits.sends))
        for strips, place in zip(transfers.sent, self._packed(buffer, transfers.sent), strict=True):
            place.copy_(strips_of(self._local, self._dim, strips))
        self._received, self._work = start_exchange(buffer, splits, ranks.group)
        self._strips = transfers.received
        ranks.exchanges += 1
        ranks.received_bytes += self._received.numel() * self._received.element_size()

    def _packed(self, memory: Tensor, parts: Sequence[Strips]) -> list[Tensor]:
        """Return where each of the strips is in `memory`: (strips, B, ..., rows, ...)."""
        views, at, shape = [], 0, list(self._local.shape)
        for strips in parts:
            shape[self._dim] = strips.rows
            views.append(packed(memory, at, (len(strips.firsts), *shape), self._order))
            at += views[-1].numel()
        return views

    def wait(self) -> list[tuple[Strips, Tensor]]:
        """Return the received rows, counted from the first that this rank needs, as (strips, B, ..., rows, ...)."""
        if self._work is None:
            return []
        self._work.wait()
        return list(zip(self._strips, self._packed(self._received, self._strips), strict=True))

    def assembled(self, zeros_above: int = 0, zeros_below: int = 0) -> Tensor:
        """Return the rows of this rank's need between rows of zeros, (..., zeros + need + zeros, ...), in the order of
        memory if one was given: a view if that is what it holds, else a new tensor.
        """
        halo, dim = self.wait(), self._dim
        start, stop = _overlap(self._need, self._held) or (self._held[0], self._held[0])
        middle = self._local.narrow(dim, start - self._held[0], stop - start)
        if not (halo or zeros_above or zeros_below):
            return middle if self._order is None else middle.contiguous(memory_format=self._order)
        shape, rows = list(middle.shape), self._need[1] - self._need[0]
        shape[dim] = zeros_above + rows + zeros_below
        full = torch.empty(
            shape, dtype=middle.dtype, device=middle.device, memory_format=self._order or torch.contiguous_format
        )
        needed = full
        if zeros_above:
            full.narrow(dim, 0, zeros_above).zero_()
        if zeros_below:
            full.narrow(dim, zeros_above + rows, zeros_below).zero_()
        if zeros_above or zeros_below:
            needed = full.narrow(dim, zeros_above, rows)
        if stop > start:
            needed.narrow(dim, start - self._need[0], stop - start).copy_(middle)
        for strips, received in halo:
            strips_of(needed, dim, strips).copy_(received)
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
