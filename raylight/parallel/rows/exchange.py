"""Rows that a rank needs of others: halos, and the same rows under other cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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
        self._need, self._held = needs[ranks.rank], rows.spans[ranks.rank]
        self._work = None
        self._parts: list[tuple[Span, int]] = []
        missing = [_missing(need, held) for need, held in zip(needs, rows.spans, strict=True)]
        if not any(missing):
            return
        own = rows.cuts.spans
        sent = [[_overlap(part, own[ranks.rank]) for part in parts] for parts in missing]
        sent[ranks.rank] = []
        received = [[_overlap(part, span) for part in missing[ranks.rank]] for span in own]
        received[ranks.rank] = []
        shape = list(tensor.shape)
        shape[self._dim] = 1
        row = torch.Size(shape).numel()  # elements

        def count(parts: list[Span | None]) -> int:
            return sum((part[1] - part[0]) * row for part in parts if part)

        send_counts, receive_counts = [count(parts) for parts in sent], [count(parts) for parts in received]
        buffer = self._local.new_empty(sum(send_counts))
        offset = 0
        for start, stop in filter(None, (part for parts in sent for part in parts)):
            piece = self._local.narrow(self._dim, start - self._held[0], stop - start)
            buffer[offset : offset + piece.numel()].view(piece.shape).copy_(piece)
            offset += piece.numel()
        self._received, self._work = start_exchange(
            buffer, Splits(tuple(send_counts), tuple(receive_counts)), ranks.group
        )
        self._parts = [(part, (part[1] - part[0]) * row) for parts in received for part in parts if part]
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

    def assembled(self) -> Tensor:
        """Return the rows of this rank's need, (..., need, ...): a view if it holds them all, else a new tensor."""
        above, below = self.wait()
        start, stop = _overlap(self._need, self._held) or (self._held[0], self._held[0])
        middle = self._local.narrow(self._dim, start - self._held[0], stop - start)
        return torch.cat([*above, middle, *below], self._dim) if above or below else middle


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
    return replace(rows, cuts=cuts, held=None)
