"""Sharded weights on real GPUs, without Ray: blocks in any order, and gathers within a CUDA graph."""

from __future__ import annotations

import pytest
from gathering_cases import as_a_graph, orders_of_blocks
from gpu_cases import GPUS

from raylight.dev.local_ranks import run_ranks, values

WORLDS = sorted({1, min(2, GPUS), GPUS})


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("world", WORLDS)
def test_any_order_of_blocks(world: int, offload: bool) -> None:
    for found in values(run_ranks(world, orders_of_blocks, offload, "cuda", device_type="cuda")):
        for name, (equal, at_rest, _) in found.items():
            assert equal, name
            assert at_rest, name


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("world", WORLDS)
def test_gathers_within_a_graph(world: int, offload: bool) -> None:
    for equal in values(run_ranks(world, as_a_graph, offload, device_type="cuda")):
        assert all(equal), equal
