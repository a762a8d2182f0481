"""Unlike memory: how much of a model's weights each rank holds where these are sharded.

All ranks know the memory of all, so that each computes the same shares. Shares are whole numbers, `()` where ranks hold
equally much.
"""

from __future__ import annotations

from itertools import accumulate

import torch.distributed as dist

from .shares import Weights

_ROOM = 2  # times the weights: then even the smallest memory has room for its part, all others gathered, and the work

_of_world: Weights = ()


def use(memory: Weights) -> None:
    """Hold weights that are loaded from now on by these bytes of memory of the ranks of this world; `()` if they are
    alike. All ranks must do so between the same two runs.
    """
    global _of_world
    _of_world = memory


def in_use() -> Weights:
    """Return the bytes of memory by which weights are held now."""
    return _of_world


def shares_of(nbytes: int, memory: Weights) -> Weights:
    """Return the shares of so many bytes of weights that leave equally much of `memory`, bytes of each rank: what is
    left decides what can be computed, and how much stays gathered. `()` where there is room for everything anyhow: from
    memory that all ranks send is gathered fastest.

    >>> shares_of(20, (24, 16))
    (14, 6)
    """
    if not memory or min(memory) >= _ROOM * nbytes:
        return ()
    # What is left on each of the `count` largest if they hold all: it is most for those that do hold any.
    in_all = enumerate(accumulate(sorted(memory, reverse=True)), start=1)
    level = max((total - nbytes) // count for count, total in in_all)
    shares = tuple(max(1, one - level) for one in memory)
    return shares if len(set(shares)) > 1 else ()


def held_by_each(nbytes: int, ranks: int, memory: Weights) -> tuple[int, ...]:
    """Return how many of so many bytes of weights each rank holds, about, by `memory` as in `shares_of`."""
    shares = shares_of(nbytes, memory)
    return tuple(nbytes * share // sum(shares) for share in shares) or (nbytes // ranks,) * ranks


def own_part(nbytes: int, ranks: int) -> int:
    """Return how many of so many bytes of weights this rank holds of those that are loaded now, about."""
    return held_by_each(nbytes, ranks, _of_world)[dist.get_rank() if _of_world else 0]
