"""How many tokens or heads each rank gets. Sizes are uneven instead of padded: the first ranks get one more, or by
weights the faster ranks more (see `shares`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
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


def divide(total: int, parts: int, weights: Sequence[int] = (), least: int = 1) -> tuple[int, ...]:
    """As `partition`, or in proportion to `weights`, whole numbers: what takes longest, the largest size by weight, is
    as small as it can be. No size is below `least` then, unless `total` is too small for that: it is divided evenly.

    >>> divide(12, 2, (2, 1))
    (8, 4)
    """
    if not weights or total < parts * least:
        return partition(total, parts)
    sizes = [max(least, total * weight // sum(weights)) for weight in weights]
    while sum(sizes) > total:  # some were raised to `least`
        above = [i for i, size in enumerate(sizes) if size > least]
        sizes[max(above, key=lambda i: Fraction(sizes[i], weights[i]))] -= 1
    while sum(sizes) < total:
        sizes[min(range(parts), key=lambda i: Fraction(sizes[i] + 1, weights[i]))] += 1
    return tuple(sizes)


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


def shard_stream(total: int, loads: Sequence[int], weights: Sequence[int] = ()) -> Shards:
    """Shard `total` tokens of a stream, by `weights` if there are any, over ranks that have `loads[r]` tokens of other
    streams already.

    Fewer tokens than ranks go one each to the ranks with the smallest loads, the last ones among equals.

    >>> shard_stream(1, (4, 3, 3)).sizes
    (0, 0, 1)
    """
    ranks = len(loads)
    if total >= ranks:
        sizes = divide(total, ranks, weights)
    else:
        relative = [Fraction(load, weight) for load, weight in zip(loads, weights or (1,) * ranks, strict=True)]
        taking = sorted(range(ranks), key=lambda rank: (relative[rank], -rank))[:total]
        sizes = tuple(int(rank in taking) for rank in range(ranks))
    spans = tuple(
        (start, start + size) if size else (max(total - 1, 0), total)
        for start, size in zip(offsets(sizes), sizes, strict=True)
    )
    return Shards(sizes, spans)
