"""How many tokens or heads each rank gets. Sizes are uneven instead of padded: the first ranks get one more."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


def partition(total: int, parts: int) -> tuple[int, ...]:
    """Return the sizes of `parts` contiguous chunks of `total`, as `torch.tensor_split` makes them.

    >>> partition(7, 3)
    (3, 2, 2)

    Raises ValueError: when `parts` is below 1.
    """
    if parts < 1:
        raise ValueError(f"partition needs at least one part, got {parts}")
    base, extra = divmod(total, parts)
    return tuple(base + (i < extra) for i in range(parts))


def offsets(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the start of each of the concatenated chunks of `sizes`.

    >>> offsets((3, 2, 2))
    (0, 3, 5)
    """
    return tuple(accumulate(sizes, initial=0))[:-1]


@dataclass(frozen=True)
class Shards:
    """Which tokens of one stream are on which rank.

    Rank r has `sizes[r]` tokens of its own; its tensors hold tokens `spans[r]`, as (start, stop). These differ only for
    a rank without tokens of its own: it holds a placeholder, the stream's last token, since model code and kernels may
    not accept empty tensors. A placeholder is never exchanged.
    """

    sizes: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    @functools.cached_property
    def total(self) -> int:
        """The number of tokens on all ranks together."""
        return sum(self.sizes)

    def placeholders(self, rank: int) -> int:
        """Return the number of placeholders in the tensors of `rank`."""
        start, stop = self.spans[rank]
        return stop - start - self.sizes[rank]

    def prefix(self, count: int) -> Shards:
        """Return the shards of the first `count` tokens, on the ranks where they are."""
        sizes = tuple(
            min(max(count - start, 0), size) for start, size in zip(offsets(self.sizes), self.sizes, strict=True)
        )
        return Shards(sizes, tuple((start, max(min(stop, count), start)) for start, stop in self.spans))


def shard_stream(total: int, loads: Sequence[int]) -> Shards:
    """Shard `total` tokens of a stream over ranks that have `loads[r]` tokens of other streams already.

    Fewer tokens than ranks go one each to the ranks with the smallest loads, the last ones among equals.

    >>> shard_stream(1, (4, 3, 3)).sizes
    (0, 0, 1)
    """
    ranks = len(loads)
    if total >= ranks:
        sizes = partition(total, ranks)
    else:
        taking = sorted(range(ranks), key=lambda rank: (loads[rank], -rank))[:total]
        sizes = tuple(int(rank in taking) for rank in range(ranks))
    spans = tuple(
        (start, start + size) if size else (max(total - 1, 0), total)
        for start, size in zip(offsets(sizes), sizes, strict=True)
    )
    return Shards(sizes, spans)
