"""Settings that ComfyUI applies to weights only when it loads them reach weights that are loaded already."""

from __future__ import annotations

import logging
import operator
from functools import partial
from pathlib import Path

import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_model_advanced import ModelComputeDtype, ModelSamplingFlux
from dropin_cases import plain, sample
from torch import Tensor

from raylight.cluster.config import SessionConfig
from raylight.driver import api
from raylight.host import patcher_state
from raylight.host.recipe import OFFLOADED, REPLICATED, SHARDED, ModelRecipe, RayModel, WorkerConfig
from raylight.parallel.mesh import MeshShape

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("as_comfyui_runs_nodes")]
WORKERS = WorkerConfig(SessionConfig(MeshShape(ulysses=2), "cpu"), "TORCH_FLASH")


def dropin(path: Path, sharding: str = REPLICATED) -> ModelPatcher:
    return api.load(RayModel(WORKERS, ModelRecipe.of(str(path), "default", sharding)))


def computing_in(model: ModelPatcher, dtype: str) -> ModelPatcher:
    return ModelComputeDtype().patch(model, dtype)[0]


def latent(model: ModelPatcher, stays_here: bool = False) -> Tensor:
    return sample(plain(model), stays_here=stays_here, steps=2)[0]


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.std()).item()


@pytest.mark.parametrize("stays_here", [False, True])
def test_compute_dtypes_in_turn(stays_here: bool, stock: ModelPatcher, path: Path) -> None:
    model = dropin(path)
    float32, bf16 = latent(stock), latent(computing_in(stock, "bf16"))
    rounding = error(bf16, float32)
    assert rounding > 1e-3, "the dtype changes nothing"
    in_bf16, in_fp16 = computing_in(model, "bf16"), computing_in(model, "fp16")
    assert error(latent(model, stays_here), float32) <= 1e-4
    first = latent(in_bf16, stays_here)
    assert error(first, float32) > rounding / 4
    assert error(first, bf16) <= 2 * rounding  # whoever adds in another order rounds otherwise
    assert 0 < error(latent(in_fp16, stays_here), float32) < rounding
    assert torch.equal(latent(in_bf16, stays_here), first)
    assert error(latent(model, stays_here), float32) <= 1e-4
    assert torch.equal(latent(computing_in(model, "bf16"), stays_here), first)
    assert error(latent(computing_in(model, "default"), stays_here), float32) <= 1e-4


def scaling(model: ModelPatcher, by: float) -> ModelPatcher:
    model = model.clone()
    model.add_weight_wrapper("diffusion_model.img_in.weight", partial(operator.mul, by))
    return model


@pytest.mark.parametrize("stays_here", [False, True])
def test_functions_around_weights_in_turn(stays_here: bool, stock: ModelPatcher, path: Path) -> None:
    model = dropin(path)
    for by in (None, 1.5, 0.5, None, 1.5):
        ours, theirs = (one if by is None else scaling(one, by) for one in (model, stock))
        assert error(latent(ours, stays_here), latent(theirs)) <= 1e-4
    assert error(latent(scaling(stock, 1.5)), latent(stock)) > 1e-2, "it changes nothing"


def test_what_changes_no_weights_loads_nothing(stock: ModelPatcher) -> None:
    on_worker = stock.clone()
    for one in (stock.clone(), computing_in(stock, "default")):
        patcher_state.apply_state(on_worker, patcher_state.of_run(one), REPLICATED)
        assert on_worker.patches_uuid == stock.patches_uuid


def test_objects_of_a_clone_before_leave_the_weightless_model(path: Path) -> None:
    model = dropin(path)
    plain_one = model.model.model_sampling
    for one in (computing_in(model, "bf16"), model, ModelSamplingFlux().patch(model, 1.15, 0.5, 256, 256)[0], model):
        comfy.model_management.load_models_gpu([one])
        assert model.model.manual_cast_dtype == one.object_patches.get("manual_cast_dtype")
        assert model.model.model_sampling is one.object_patches.get("model_sampling", plain_one)


@pytest.mark.parametrize("sharding", [SHARDED, OFFLOADED])
@pytest.mark.parametrize("stays_here", [False, True])
def test_split_weights_refuse_a_compute_dtype(
    sharding: str, stays_here: bool, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = dropin(path, sharding)
    before = latent(model, stays_here)
    with (
        caplog.at_level(logging.INFO, "raylight"),
        pytest.raises(ValueError, match="compute dtype of its own, which split weights cannot have: switch FSDP off"),
    ):
        latent(computing_in(model, "bf16"), stays_here)
    assert "ending the workers" not in caplog.text
    assert torch.equal(latent(model, stays_here), before)
