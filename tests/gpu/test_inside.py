"""What nodes of packs change inside of a model, prompts of one token, and errors that all ranks meet, on real GPUs."""

from __future__ import annotations

import importlib.util
import logging
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_cases import CASES, checkpoint
from comfy_extras import nodes_custom_sampler
from dropin_cases import prompt, sample
from gpu_cases import GPUS, HALF, WORKERS, error, latent, on_workers
from torch import Tensor

from raylight.cluster import active_session
from raylight.driver import api
from raylight.host.recipe import REPLICATED, SHARDED, ModelRecipe, RayModel

CHANGES = {
    "AttentionForward": REPLICATED,
    "CrossAttentionMean": SHARDED,
    "ChunkedFeedForward": REPLICATED,
    "RootForward": SHARDED,
    "InPlaceBlock": REPLICATED,
    "ForwardHook": SHARDED,
    "WeightInPlace": REPLICATED,
    "WeightData": SHARDED,
}


@pytest.fixture(scope="module")
def pack() -> ModuleType:
    """Imported by its path, as ComfyUI imports packs."""
    path = Path(__file__).parents[1] / "support" / "changing_pack" / "__init__.py"
    spec = importlib.util.spec_from_file_location(str(path.parent), path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def worker_pids() -> list[int]:
    return [place.pid for _, place in sorted(active_session.running().places.items())]


def changed(pack: ModuleType, change: str, model: ModelPatcher) -> ModelPatcher:
    model = model.clone()
    getattr(pack, change)(model)
    return model


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_inside(change: str, pack: ModuleType, path: Path, expected: Tensor, compare) -> None:
    stock = changed(pack, change, comfy.sd.load_diffusion_model(str(path)))
    behind = changed(pack, change, comfy.sd.load_diffusion_model(str(path)))
    wanted = latent(stock)
    assert change == "AttentionForward" or error(wanted, expected) > 2 * HALF, "it changes nothing"
    workers = replace(WORKERS, sharding=CHANGES[change])
    compare(latent(changed(pack, change, on_workers(path, CHANGES[change]))), wanted, "drop-in")
    compare(latent(api.parallelize(behind, workers)), wanted, "Parallelize")
    compare(latent(on_workers(path, CHANGES[change])), expected, "without it")


@pytest.mark.parametrize("sharding", [REPLICATED, SHARDED])
def test_an_error_that_all_workers_meet_costs_none(
    sharding: str, pack: ModuleType, path: Path, expected: Tensor, compare
) -> None:
    model = on_workers(path, sharding)
    compare(latent(model), expected, "before")
    pids = worker_pids()
    with pytest.raises(RuntimeError, match="this node has failed"):
        latent(changed(pack, "Failing", model))
    compare(latent(model), expected, "the run after it")
    assert worker_pids() == pids


@pytest.mark.parametrize("sharding", [REPLICATED, SHARDED])
def test_prompts_of_one_token(sharding: str, folder: Path, compare, caplog: pytest.LogCaptureFixture) -> None:
    path = checkpoint(folder, replace(CASES["Flux with guidance"], heads=max(3, GPUS)))

    def run(model: ModelPatcher) -> Tensor:
        guider = nodes_custom_sampler.CFGGuider.execute(model, prompt(1, 3), prompt(2, 1), 3.0).result[0]
        return sample(guider)[0].float().cpu()

    wanted = run(comfy.sd.load_diffusion_model(str(path)))
    workers = replace(WORKERS, attention="auto", sharding=sharding)
    with caplog.at_level(logging.INFO, "raylight"):
        actual = run(api.load(RayModel(workers, ModelRecipe.of(str(path), "default", sharding))))
    compare(actual, wanted, "one token")
    assert torch.isfinite(actual).all()
