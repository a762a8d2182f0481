"""Forwards replayed as CUDA graphs on real GPUs: equal to the last bit, right after each change, and gone when they
should be.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_easycache import EasyCacheNode
from gpu_cases import DEPTHS, GPUS, HALF, LONG, SHAPE, WORKERS, error, latent, on_workers, wan
from graph_cases import FORWARDS, every_call
from torch import Tensor

from raylight.cluster import active_session
from raylight.dev.local_ranks import run_ranks, values
from raylight.dev.zoo import families
from raylight.driver import api
from raylight.host.jobs import RankMemory
from raylight.host.recipe import REPLICATED, SHARDED, ModelRecipe, RayModel
from raylight.host.worker_service import WorkerService
from raylight.parallel.graph_pool import LARGEST_NUMBER
from raylight.parallel.graphs import OFF, ON
from raylight.parallel.mesh import MeshShape

STEPS = 5
KINDS = 2  # of forwards in a run: the prompts have other lengths
# What CUDA cannot capture of the families, by their first words in the log.
WAITS = "the host waits for the GPU in it"
PATCHED = "nodes have put patches into the model"
SIX = ("Flux Dev", "Wan T2V", "Qwen Image", "Z-Image", "LTX-Video", "Hunyuan Video")

both_depths = pytest.mark.parametrize("depth", DEPTHS)


def held() -> list[RankMemory]:
    """What each rank holds."""
    answers = active_session.running().run_all(WorkerService.memory)
    return [answers[rank] for rank in sorted(answers)]


def graphs() -> set[int]:
    """The numbers of graphs that ranks hold."""
    return {rank.graphs for rank in held()}


def bare(path: Path, depth: str, shape: tuple[int, ...] = SHAPE, steps: int = STEPS) -> Tensor:
    """The latent by the same workers without graphs."""
    return latent(on_workers(path, REPLICATED, graphs=OFF), DEPTHS[depth], shape, steps)


@both_depths
def test_the_first_run_of_fresh_workers(depth: str, path: Path) -> None:
    api.end_workers(with_ray=False)
    model = on_workers(path, REPLICATED)
    first = latent(model, DEPTHS[depth], steps=STEPS)
    assert graphs() == {KINDS}
    assert torch.equal(first, latent(model, DEPTHS[depth], steps=STEPS))
    assert torch.equal(first, bare(path, depth))
    assert graphs() == {KINDS}


@pytest.mark.skipif(GPUS < 2, reason="one GPU has one mesh")
@both_depths
def test_split_batches(depth: str, path: Path) -> None:
    """On a mesh with a batch axis, whose gather stays outside of graphs."""
    mesh = MeshShape(batch=2, ulysses=GPUS // 2)
    without = latent(on_workers(path, REPLICATED, mesh=mesh, graphs=OFF), DEPTHS[depth], (2, *SHAPE[1:]), STEPS)
    model = on_workers(path, REPLICATED, mesh=mesh, graphs=ON)
    for _ in range(2):
        assert torch.equal(latent(model, DEPTHS[depth], (2, *SHAPE[1:]), STEPS), without)
    assert graphs() == {KINDS}


@both_depths
def test_a_lora_on_and_off(depth: str, path: Path, lora: Path, stock: ModelPatcher, compare) -> None:
    tensors = comfy.utils.load_torch_file(str(lora))

    def with_lora(model: ModelPatcher, strength: float) -> ModelPatcher:
        return comfy.sd.load_lora_for_models(model, None, tensors, strength, 0)[0]

    model = on_workers(path, REPLICATED, graphs=ON)
    for strength in (0.0, 0.8, 0.4, 0.0, 0.8):
        wanted = latent(with_lora(stock, strength) if strength else stock, steps=STEPS)
        one = with_lora(model, strength) if strength else model
        compare(latent(one, DEPTHS[depth], steps=STEPS), wanted, f"strength {strength}")
        assert graphs() == {KINDS}


@both_depths
def test_easycache(depth: str, path: Path) -> None:
    def cached(model: ModelPatcher) -> ModelPatcher:
        return EasyCacheNode.execute(model, 0.5, 0.15, 0.95, False).result[0]

    steps = 12
    without = latent(cached(on_workers(path, REPLICATED, graphs=OFF)), DEPTHS[depth], steps=steps)
    assert error(without, bare(path, depth, steps=steps)) > HALF, "it caches nothing"
    model = cached(on_workers(path, REPLICATED, graphs=ON))
    for _ in range(2):
        assert torch.equal(latent(model, DEPTHS[depth], steps=steps), without)


@both_depths
def test_many_sizes(depth: str, path: Path) -> None:
    model = on_workers(path, REPLICATED, graphs=ON)
    free = []
    for turn in range(2):
        for width in range(20, 52, 4):
            shape = (*SHAPE[:-1], width)
            actual = latent(model, DEPTHS[depth], shape, STEPS)
            if turn == 0:
                assert torch.equal(actual, bare(path, depth, shape))
        assert max(graphs()) <= LARGEST_NUMBER
        free.append(min(rank.free_bytes for rank in held()))
    assert free[0] - free[1] < 256 << 20, "graphs pile up"


@both_depths
def test_two_models_in_turns(depth: str, folder: Path, path: Path) -> None:
    other = wan(folder, seed=1)
    wanted = [bare(one, depth) for one in (path, other)]
    for _ in range(2):
        for one, right in zip((path, other), wanted, strict=True):
            assert torch.equal(latent(on_workers(one, REPLICATED, graphs=ON), DEPTHS[depth], steps=STEPS), right)
    assert graphs() == {2 * KINDS}


@both_depths
def test_nothing_is_left_of_a_model_that_is_unloaded(depth: str, path: Path) -> None:
    model = on_workers(path, REPLICATED, graphs=ON)
    first = latent(model, DEPTHS[depth], steps=STEPS)
    assert graphs() == {KINDS}
    comfy.model_management.unload_all_models()
    assert [(rank.graphs, rank.graph_bytes) for rank in held()] == [(0, 0)] * GPUS
    assert torch.equal(latent(model, DEPTHS[depth], steps=STEPS), first)
    free_after = on_workers(path, REPLICATED, graphs=ON, free_memory_after=True)
    assert torch.equal(latent(free_after, DEPTHS[depth], steps=STEPS), first)
    if not DEPTHS[depth]:  # workers do not know which forward is the last
        assert graphs() == {0}


@both_depths
def test_a_cancel_between_replays(depth: str, path: Path) -> None:
    model = on_workers(path, REPLICATED, graphs=ON)
    first = latent(model, DEPTHS[depth], steps=STEPS)

    def cancel(step: int) -> None:
        if step == 3:
            comfy.model_management.interrupt_current_processing()

    pids = [place.pid for place in active_session.running().places.values()]
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            latent(model, DEPTHS[depth], LONG, steps=60, on_step=cancel)
    finally:
        comfy.model_management.interrupt_current_processing(False)
    assert torch.equal(latent(model, DEPTHS[depth], steps=STEPS), first)
    assert [place.pid for place in active_session.running().places.values()] == pids


@pytest.mark.parametrize("dtype", ["fp8_e4m3fn", "bf16"])
def test_weights_of_another_dtype(dtype: str, path: Path) -> None:
    """Cast on each use, and converted once."""
    results = []
    for mode in (OFF, ON, ON):
        workers = replace(WORKERS, graphs=mode)
        model = api.load(RayModel(workers, ModelRecipe.of(str(path), dtype, REPLICATED)))
        results.append(latent(model, steps=STEPS))
    assert all(torch.equal(one, results[0]) for one in results)
    assert graphs() == {KINDS}


def test_sharded_weights(path: Path, expected: Tensor, compare) -> None:
    """They run as they are, which the log says, or replay."""
    model = on_workers(path, SHARDED, graphs=ON)
    for what in ("first", "second"):
        compare(latent(model), expected, f"{what} run")


@pytest.mark.parametrize(("world", "shards"), [(1, False), (2, False), (2, True)])
def test_families(world: int, shards: bool, report_parity) -> None:
    """All on one GPU, six on two, of which one cannot capture; it runs as it is beside the other's replays."""
    if world > GPUS:
        pytest.skip("needs two GPUs")
    names = tuple(families()) if world == 1 else SIX[:2] if shards else SIX
    mesh = MeshShape(ulysses=world)
    ranks = values(run_ranks(world, every_call, names, mesh, True, True, shards, timeout_s=400, device_type="cuda"))
    wrong = []
    for (family, call), first in ranks[0].items():
        report_parity(
            f"graph on {world} GPUs  {family}, {call}: {first.replays} replays, relative L2 {first.error:.1e}"
        )
        for rank in ranks:
            one = rank[family, call]
            if one.failure or one.error > 1e-5:
                wrong.append(f"{family}, {call}: {one.error:.1e} {one.failure}")
        if any(WAITS in reason or PATCHED in reason for reason in first.reasons):
            report_parity(f"    {first.reasons}")
            continue
        if first.replays != FORWARDS - 2:
            wrong.append(f"{family}, {call}: not captured: {first.reasons}")
        if world > 1 and "it cannot be captured" not in str(ranks[-1][family, call].reasons):
            wrong.append(f"{family}, {call}: captured on a rank that cannot")
    assert not wrong, "\n".join(wrong)
