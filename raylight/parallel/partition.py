"""How a count of tokens or heads is dealt to ranks. No padding: the first ranks take one more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


def partition(total: int, parts: int) -> tuple[int, ...]:
    """Sizes of `parts` contiguous pieces of `total`, as `torch.tensor_split` cuts them.

    >>> partition(7, 3)
    (3, 2, 2)
    """
    if parts < 1:
        raise ValueError(f"partition needs at least one part, got {parts}")
    base, extra = divmod(total, parts)
    return tuple(base + (i < extra) for i in range(parts))


def offsets(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Start of each piece, for pieces of `sizes` laid end to end."""
    starts, position = [], 0
    for size in sizes:
        starts.append(position)
        position += size
    return tuple(starts)


@dataclass(frozen=True, slots=True)
class Pieces:
    """Which tokens of one stream are where.

    `sizes[r]` tokens are rank r's, in rank order. Between start and stop `held[r]` are those that it has in its
    tensors: its own, and where it has none a stand-in, since a model's code and kernels need not take empty tensors.
    A stand-in is the stream's last token once more, of which nothing is ever sent.
    """

    sizes: tuple[int, ...]
    held: tuple[tuple[int, int], ...]

    @property
    def total(self) -> int:
        return sum(self.sizes)

    def lent(self, rank: int) -> int:
        """Stand-ins on this rank."""
        start, stop = self.held[rank]
        return stop - start - self.sizes[rank]

    def prefix(self, count: int) -> Pieces:
        """Of the first `count` tokens."""
        sizes = tuple(
            min(max(count - start, 0), size) for start, size in zip(offsets(self.sizes), self.sizes, strict=True)
        )
        return Pieces(sizes, tuple((start, max(min(stop, count), start)) for start, stop in self.held))


def deal(total: int, loads: Sequence[int]) -> Pieces:
    """`total` tokens of a stream over ranks that have so many tokens of other streams already.

    Fewer tokens than ranks go one by one to the ranks with the fewest, the last ones of these.

    >>> deal(1, (4, 3, 3)).sizes
    (0, 0, 1)
    """
    ranks = len(loads)
    if total >= ranks:
        sizes = partition(total, ranks)
    else:
        taking = sorted(range(ranks), key=lambda rank: (loads[rank], -rank))[:total]
        sizes = tuple(int(rank in taking) for rank in range(ranks))
    held = tuple(
        (start, start + size) if size else (max(total - 1, 0), total)
        for start, size in zip(offsets(sizes), sizes, strict=True)
    )
    return Pieces(sizes, held)
