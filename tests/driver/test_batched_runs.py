"""Several runs at once, on groups of workers, against ComfyUI in one process doing them one by one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_cases import CASES, checkpoint
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise
from dropin_cases import SETUPS, prompt, sample

from raylight.cluster.config import SessionConfig
from raylight.driver import api
from raylight.host.recipe import REPLICATED, SHARDED, ModelRecipe, RayModel, WorkerConfig
from raylight.parallel.mesh import MeshShape

TOLERANCE = 1e-4
SEEDS = (3, 7, 11)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("models"), CASES["Flux with guidance"])


@pytest.fixture(scope="module")
def stock(path: Path) -> ModelPatcher:
    return comfy.sd.load_diffusion_model(str(path))


@pytest.fixture(autouse=True)
def as_comfyui_runs_nodes() -> Iterator[None]:
    with torch.inference_mode():
        yield


def dropin(path: Path, mesh: MeshShape, sharding: str) -> ModelPatcher:
    return api.load(
        RayModel(
            WorkerConfig(SessionConfig(mesh, "cpu"), "TORCH_FLASH"), ModelRecipe.of(str(path), "default", sharding)
        )
    )


def runs(model: ModelPatcher, samplers: tuple[str, ...], masked: bool = False) -> list[Any]:
    """Runs that differ in noise, prompt and its length, and in steps."""
    mask = {"noise_mask": torch.ones(1, 1, 12, 10).tril()} if masked else {}
    return [
        partial(
            api.ksampler,
            noise=Noise_RandomNoise(seed),
            ray_actors=model,
            latent_image={"samples": torch.zeros(1, 16, 12, 10), **mask},
            positive=prompt(seed, 10 + seed),
            negative=prompt(2, 17),
            add_noise="enable",
            steps=2 + place,
            cfg=2.0,
            sampler_name=samplers[place],
            scheduler="simple",
            start_at_step=0,
            end_at_step=10000,
            return_with_leftover_noise="disable",
        )
        for place, seed in enumerate(SEEDS)
    ]


@pytest.mark.parametrize(
    ("mesh", "sharding"),
    [
        (MeshShape(ulysses=2), REPLICATED),
        (MeshShape(batch=2), REPLICATED),
        (MeshShape(batch=2), SHARDED),
        pytest.param(MeshShape(batch=3), SHARDED, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_equals_comfyui_one_by_one(
    mesh: MeshShape, sharding: str, path: Path, stock: ModelPatcher, caplog: pytest.LogCaptureFixture
) -> None:
    samplers = ("euler", "heun", "dpmpp_2m_sde")
    expected = [run()["samples"] for run in runs(stock, samplers, masked=True)]
    with caplog.at_level(logging.INFO, "raylight"):
        actual = [latent["samples"] for latent in api.at_once(runs(dropin(path, mesh, sharding), samplers, True))]
    assert "the workers do 3 runs at once" in caplog.text
    for one, other in zip(actual, expected, strict=True):
        assert ((one - other).abs().max() / other.std()).item() <= TOLERANCE
    assert (expected[0] - expected[1]).std() > 0.1


@pytest.mark.slow
def test_fewer_runs_than_groups_and_runs_that_stay_here(path: Path, stock: ModelPatcher) -> None:
    model = dropin(path, MeshShape(batch=3), SHARDED)
    for count, stays_here in ((2, False), (1, False), (2, True)):
        actual = api.at_once(
            [partial(sample, SETUPS["plain"](model), seed=seed, stays_here=stays_here) for seed in SEEDS[:count]]
        )
        for seed, (one, _) in zip(SEEDS, actual, strict=False):
            other, _ = sample(SETUPS["plain"](stock), seed=seed)
            assert ((one - other).abs().max() / other.std()).item() <= TOLERANCE
