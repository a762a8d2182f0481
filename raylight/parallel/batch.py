"""The batch axis of the mesh: ranks that each do some rows of a model's batch.

Positive and negative prompt, several images, several prompts: whatever comes as one batch. CFG parallelism and data
parallelism are this one thing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .collectives import all_gather
from .partition import offsets, partition


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows `start` to `stop` of `total`: this rank's part of a batch."""

    start: int
    stop: int
    total: int

    def of(self, value: Any) -> Any:
        """These rows of every tensor that has `total`, in nested lists, tuples and dicts."""
        if isinstance(value, Tensor):
            return value[self.start : self.stop] if value.ndim and value.shape[0] == self.total else value
        if isinstance(value, Mapping):
            return {name: self.of(item) for name, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self.of(item) for item in value)
        return value

    def of_chunks(self, marks: list[Any]) -> list[Any]:
        """Marks of the equal chunks of the batch, for these rows: one for each chunk where they are whole chunks, else
        one for each row."""
        height = self.total // len(marks)
        if self.start % height == 0 and self.stop % height == 0:
            return marks[self.start // height : self.stop // height]
        return [marks[row // height] for row in range(self.start, self.stop)]


class BatchAxis:
    """The ranks of one group, which share a batch. The same rows are on all ranks of a sequence."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._rank = dist.get_rank(group)
        self.degree = dist.get_world_size(group)

    def can_split(self, total: int) -> bool:
        """Whether each rank would have a row."""
        return total >= self.degree > 1

    def call(self, function: Callable[[Rows], Any], total: int) -> Any:
        """What `function` returns for all rows of a batch of `total`, of its tensors (rows, ...) for this rank's."""
        sizes = partition(total, self.degree)
        start = offsets(sizes)[self._rank]
        return self._join(function(Rows(start, start + sizes[self._rank], total)), sizes)

    def _join(self, output: Any, sizes: tuple[int, ...]) -> Any:
        if isinstance(output, Tensor):
            return all_gather(output, sizes, 0, self._group)
        return type(output)(self._join(item, sizes) for item in output)
