"""Rows of weights: which of them a rank holds, and gathering them as bytes, whatever their dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from raylight.parallel.collectives import all_gather
from raylight.parallel.partition import divide, offsets
from raylight.parallel.shares import Weights


@dataclass(frozen=True, slots=True)
class RowSplit:
    """How the rows of each weight are divided over `ranks`, of which this is `rank`: by `shares`, whole numbers, or
    evenly if there are none.
    """

    ranks: int
    rank: int
    shares: Weights = ()

    @classmethod
    def over(cls, mesh: DeviceMesh, shares: Weights = ()) -> RowSplit:
        """Return the split over a mesh of one dimension."""
        return cls(mesh.size(), mesh.get_local_rank(), shares)

    @property
    def is_even(self) -> bool:
        """Whether all ranks have the same number of rows, but for the last ones, which may have fewer, or none."""
        return not self.shares

    def sizes(self, count: int) -> tuple[int, ...]:
        """Return how many of `count` rows each rank holds: evenly as `torch.chunk` cuts them, or in proportion to
        shares, which may give a rank none.
        """
        if self.shares:
            return divide(count, self.ranks, self.shares, least=0)
        most = -(-count // self.ranks)
        return tuple(min(most, max(0, count - rank * most)) for rank in range(self.ranks))

    def own(self, count: int) -> slice:
        """Return the rows of `count` that this rank holds."""
        sizes = self.sizes(count)
        start = offsets(sizes)[self.rank]
        return slice(start, start + sizes[self.rank])


def gather_rows(local: Tensor, count: int, split: RowSplit, mesh: DeviceMesh) -> Tensor:
    """Return the full tensor (count, ...) of which `local` has this rank's rows, on its device. Collective.

    Any dtype: bytes are sent.
    """
    rows = local.contiguous().view(torch.uint8).flatten(1)
    full = all_gather(rows, split.sizes(count), 0, mesh.get_group())
    return full.view(-1).view(local.dtype).view(count, *local.shape[1:])
