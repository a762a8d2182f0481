"""Unlike ranks: the speeds of all ranks of the world, and the shares of the work that follow from them.

Between two exchanges ranks wait for the slowest, so each kind of work is divided by itself: tokens by the speed of
matrix products, in which most of the time outside of attention goes, and heads by the speed of attention. A ring
divides attention by tokens too.

Speeds are whole numbers, the same on every rank, so that all ranks compute the same sizes. *Weights* are the speeds of
the ranks of one group, `()` where these are alike: then all sizes are what they are without speeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

Weights = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Speeds:
    """How fast each rank of the world is, relative to the others: in matrix products, and in attention. Whole numbers
    above 0; empty if all are alike.

    Raises ValueError: when these are not as many, or one is not above 0.
    """

    products: Weights = ()
    attention: Weights = ()

    def __post_init__(self) -> None:
        if len(self.products) != len(self.attention) or any(one < 1 for one in (*self.products, *self.attention)):
            raise ValueError(f"speeds must be whole numbers above 0, two for each rank: {self}")

    @property
    def overall(self) -> Weights:
        """The speed of each rank in work of both kinds."""
        return tuple(one + other for one, other in zip(self.products, self.attention, strict=True))


ALIKE = Speeds()

_of_world = ALIKE


def use(speeds: Speeds) -> None:
    """Divide the work of this world by these speeds from now on. All ranks must do so between the same two runs."""
    global _of_world
    _of_world = speeds


def in_use() -> Speeds:
    """Return the speeds by which work is divided now."""
    return _of_world


def of_tokens(group: dist.ProcessGroup, has_ring: bool) -> Weights:
    """Return the weights by which the ranks of `group` divide tokens."""
    speeds = _of_world.overall if has_ring else _of_world.products
    return _uneven([speeds[rank] for rank in dist.get_process_group_ranks(group)]) if speeds else ()


def of_heads(ulysses: dist.ProcessGroup, ring: dist.ProcessGroup | None = None) -> Weights:
    """Return the weights by which the ranks of `ulysses` divide heads.

    In a `ring` all Ulysses groups divide heads alike, as keys pass between ranks of the same place: its speed is that
    of all its ranks. Ranks of the same place are equally far apart in all groups.
    """
    speeds = _of_world.attention
    if not speeds:
        return ()
    steps = [0] if ring is None else [other - dist.get_rank() for other in dist.get_process_group_ranks(ring)]
    return _uneven([sum(speeds[rank + step] for step in steps) for rank in dist.get_process_group_ranks(ulysses)])


def of_batch(degree: int) -> Weights:
    """Return the weights by which the `degree` groups of the batch axis divide rows. Their ranks are neighbours."""
    speeds = _of_world.overall
    ranks = len(speeds) // degree
    return _uneven([sum(speeds[first : first + ranks]) for first in range(0, len(speeds), ranks)]) if speeds else ()


def of_rows(group: dist.ProcessGroup) -> Weights:
    """Return the weights by which the ranks of `group` divide rows of an image: convolutions are matrix products."""
    return of_tokens(group, has_ring=False)


def _uneven(weights: Sequence[int]) -> Weights:
    return tuple(weights) if len(set(weights)) > 1 else ()
