"""Which modules are gathered together, and which rows are whose."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from raylight.sharding.fsdp import units
from raylight.sharding.rows import RowSplit


def test_a_unit_for_every_block_and_none_for_what_is_small() -> None:
    model = nn.Module()
    model.patch = nn.Linear(8, 64)
    model.blocks = nn.ModuleList(nn.Sequential(nn.ModuleList([nn.Linear(64, 64)])[0]) for _ in range(40))
    model.scales = nn.ModuleList(nn.Linear(1, 1) for _ in range(3))
    assert list(units(model)) == [f"blocks.{index}" for index in range(40)]


def test_blocks_in_lists_of_lists() -> None:
    model = nn.Module()
    model.stages = nn.ModuleList(nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]) for _ in range(2))
    assert list(units(model)) == ["stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1"]


@pytest.mark.parametrize("count", [1, 2, 7, 12])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_rows_are_those_of_chunk(count: int, world: int) -> None:
    matrix = torch.arange(count)
    parts = [matrix[RowSplit(world, rank).own(count)] for rank in range(world)]
    for part, expected in zip(parts, torch.chunk(matrix, world), strict=False):
        assert torch.equal(part, expected)
    assert sum(len(part) for part in parts) == count


def test_rows_by_shares() -> None:
    assert RowSplit(3, 0, (5, 1, 8)).sizes(7) == (3, 0, 4)
    assert [RowSplit(3, rank, (5, 1, 8)).own(28) for rank in range(3)] == [slice(0, 10), slice(10, 12), slice(12, 28)]
