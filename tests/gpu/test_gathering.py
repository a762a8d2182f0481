"""Sharded weights on real GPUs, without Ray: blocks in any order, and gathers within a CUDA graph."""

from __future__ import annotations

import pytest
from gathering_cases import on_gpus
from gpu_cases import GPUS

from raylight.dev.local_ranks import run_ranks, values


@pytest.mark.parametrize("world", sorted({1, GPUS}))
def test_blocks_in_any_order_and_in_a_graph(world: int) -> None:
    for orders, graphs in values(run_ranks(world, on_gpus, device_type="cuda")):
        for name, (equal, at_rest, _) in orders.items():
            assert equal, name
            assert at_rest, name
        for name, equal in graphs.items():
            assert all(equal), (name, equal)
