"""Exchanges in 8 bits on real GPUs: vectors as on the CPU, the error over NCCL, runs with and without CUDA graphs."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from eight_bit_cases import CALLS, outcomes
from gpu_cases import DEPTHS, GPUS, HALF, error, latent, on_workers
from torch import Tensor

from raylight.cluster import active_session
from raylight.dev.local_ranks import run_ranks, values
from raylight.host.recipe import REPLICATED, SHARDED
from raylight.host.worker_service import WorkerService
from raylight.parallel.eight_bits import decode, encode
from raylight.parallel.external_strategies import OURS_INT8
from raylight.parallel.graphs import OFF, ON
from raylight.parallel.mesh import MeshShape

STEPS = 5
CLOSE = 10 * HALF
TOLD = re.compile(
    r"exchange: in 8 bits, which changed what attention gets by (\d\.\d\d)%.* and its result by (\d\.\d\d)%"
)

several = pytest.mark.skipif(GPUS < 2, reason="one GPU exchanges nothing")
both_depths = pytest.mark.parametrize("depth", DEPTHS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [128, 64, 37])
def test_vectors_are_as_on_the_cpu_and_wait_for_nothing(width: int, dtype: torch.dtype) -> None:
    tensor = torch.randn(2, 5, 300, width).to(dtype)
    tensor[0, 0, 0, 0] = torch.nan
    there = tensor.cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        encoded = encode(there)
        actual = decode(encoded, width, dtype)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = decode(encode(tensor), width, dtype)
    assert actual[0, 0, 0, 0].isnan()
    # A quotient may be rounded to another integer at a tie.
    finite = expected.isfinite()
    assert error(actual.cpu()[finite].float(), expected[finite].float()) < 1e-3
    assert torch.equal(actual.cpu()[1:].isfinite(), expected[1:].isfinite())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_in_a_graph(dtype: torch.dtype) -> None:
    tensor = torch.randn(1, 4, 200, 64, device="cuda").to(dtype)
    static = tensor.clone()
    decode(encode(static), 64, dtype)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = decode(encode(static), 64, dtype)
    for factor in (1.0, 3.0, 1e-4):
        static.copy_(tensor * factor)
        graph.replay()
        assert torch.equal(result, decode(encode(static.clone()), 64, dtype))


@several
@pytest.mark.parametrize(("ring", "chunks"), [(1, 1), (1, 2), (2, 1)])
def test_the_error_over_nccl(ring: int, chunks: int) -> None:
    for report in values(run_ranks(2, outcomes, ring, chunks, "cuda", device_type="cuda")):
        for name, call in CALLS.items():
            assert report[name].error < 2e-2, name
            assert report[name].exact_error < (1e-3 if call.dtype == torch.float32 else 1e-2), name
            assert report[name].sent_bytes < 0.6 * report[name].exact_bytes or call.width < 64, name


@several
@both_depths
@pytest.mark.parametrize("sharding", [REPLICATED, SHARDED])
def test_runs_with_graphs_equal_those_without(
    depth: str, sharding: str, path: Path, stock: ModelPatcher, compare, caplog: pytest.LogCaptureFixture
) -> None:
    expected = latent(stock, steps=STEPS)

    def made(graphs: str) -> Tensor:
        model = on_workers(path, sharding, graphs=graphs, strategy=OURS_INT8)
        return latent(model, DEPTHS[depth], steps=STEPS)

    with caplog.at_level(logging.INFO, "raylight"):
        without = made(OFF)
        compare(without, expected, "in 8 bits", CLOSE)
        for turn in ("captured", "replayed"):
            assert torch.equal(made(ON), without), turn
    counts = {rank.graphs for rank in active_session.running().run_all(WorkerService.memory).values()}
    # The prompts have other lengths, and each is a graph; sharded weights may have none.
    assert counts == {2} or sharding == SHARDED
    told = [found for message in caplog.messages if (found := TOLD.match(message))]
    assert len(told) == 3
    assert all(0.1 < float(one[1]) < 2 and 0.1 < float(one[2]) < 5 for one in told)
    compare(latent(on_workers(path, sharding), DEPTHS[depth], steps=STEPS), expected, "exact again")


@several
def test_a_ring(path: Path, stock: ModelPatcher, compare) -> None:
    expected = latent(stock, steps=STEPS)
    model = on_workers(path, REPLICATED, mesh=MeshShape(ring=GPUS), strategy=OURS_INT8, graphs=ON)
    for turn in ("first run", "second run"):
        compare(latent(model, steps=STEPS), expected, turn, CLOSE)
