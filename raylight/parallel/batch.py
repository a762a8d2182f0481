"""Batch parallelism: each rank of the mesh's batch axis computes some batch rows of a forward.

The batch rows may be positive and negative prompt, several images, or several prompts: CFG parallelism and data
parallelism are the same here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from . import shares
from .collectives import all_gather
from .partition import divide, offsets


@dataclass(frozen=True, slots=True)
class Rows:
    """Batch rows `start` to `stop` of `total`: this rank's shard of a batch."""

    start: int
    stop: int
    total: int

    def of(self, value: Any) -> Any:
        """Return `value` with these rows of every tensor (total, ...), in nested lists, tuples and dicts."""
        if isinstance(value, Tensor):
            return value[self.start : self.stop] if value.ndim and value.shape[0] == self.total else value
        if isinstance(value, Mapping):
            return {name: self.of(item) for name, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self.of(item) for item in value)
        return value

    def of_chunks(self, marks: list[Any]) -> list[Any]:
        """Return the entries for these rows of a list with one entry for each of several equal chunks of the batch.

        One for each chunk if these rows are complete chunks, else one for each row.
        """
        height = self.total // len(marks)
        if self.start % height == 0 and self.stop % height == 0:
            return marks[self.start // height : self.stop // height]
        return [marks[row // height] for row in range(self.start, self.stop)]


def runs_of(group: int, groups: int, runs: int) -> list[int]:
    """Return which of several `runs` a group of the batch axis does: as many as the others, or by its speed."""
    weights = shares.of_batch(groups)
    if not weights:
        return list(range(group, runs, groups))
    sizes = divide(runs, groups, weights)
    return list(range(offsets(sizes)[group], offsets(sizes)[group] + sizes[group]))


class BatchAxis:
    """The ranks of one group, over which a batch is split. All ranks of a sequence have the same rows."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._rank = dist.get_rank(group)
        self.degree = dist.get_world_size(group)

    @property
    def name(self) -> str:
        """The name of the group."""
        return self._group.group_name

    def can_split(self, total: int) -> bool:
        """Return whether there are several ranks, and a batch of `total` has a row for each."""
        return total >= self.degree > 1

    def call(self, function: Callable[[Rows], Any], total: int) -> Any:
        """Call `function` with this rank's rows of a batch of `total`, and return its output for all rows. Collective.

        The output is a tensor, or a list or tuple of tensors: (this rank's rows, ...) -> (total, ...).
        """
        sizes = divide(total, self.degree, shares.of_batch(self.degree))
        start = offsets(sizes)[self._rank]
        return self._gather(function(Rows(start, start + sizes[self._rank], total)), sizes)

    def _gather(self, output: Any, sizes: tuple[int, ...]) -> Any:
        if isinstance(output, Tensor):
            return all_gather(output, sizes, 0, self._group)
        return type(output)(self._gather(item, sizes) for item in output)
