"""The drop-in MODEL among the models that ComfyUI has loaded."""

from __future__ import annotations

import copy
import gc
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras import nodes_custom_sampler
from dropin_cases import dual_model, equal_lengths, sample
from loras import lora_for
from torch import Tensor

from raylight.cluster.config import SessionConfig
from raylight.dev.demo.tiny import write_checkpoint
from raylight.driver import api, model_import, weightless
from raylight.driver.remote_model import RemotePatcher
from raylight.host.recipe import ModelRecipe, RayModel, WorkerConfig
from raylight.parallel.mesh import MeshShape

WORKERS = WorkerConfig(SessionConfig(MeshShape(ulysses=2), "cpu"), "TORCH_FLASH")


def test_rejects_copies_with_weights_of_their_own(tmp_path: Path) -> None:
    """As core's Train LoRA, MultiGPU CFG Split and Select Model Device ask for."""
    path = tmp_path / "wan.safetensors"
    write_checkpoint(path, "wan-t2v", heads=3)
    recipe = ModelRecipe.of(str(path), "default")
    remote = RemotePatcher.of(weightless.build(recipe, lambda x, *_: x), WORKERS, recipe, lambda x, *_: x)
    with pytest.raises(ValueError, match=r"wan.safetensors are on Raylight's workers .*: train on the MODEL"):
        remote.clone(force_deepcopy=True)
    with pytest.raises(RuntimeError, match=r"the workers divide a run .* Remove the node .* MultiGPU CFG Split"):
        remote.deepclone_multigpu(new_load_device=torch.device("cpu"))
    if "disable_dynamic" in inspect.signature(ModelPatcher.clone).parameters:  # as core's TorchCompileModel
        assert remote.clone(disable_dynamic=True).model is remote.model


def test_a_parallelized_model_that_is_dropped_is_no_leak(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """ComfyUI would collect garbage and warn at each prompt from then on."""
    path = tmp_path / "wan.safetensors"
    write_checkpoint(path, "wan-t2v", heads=3)
    model = comfy.sd.load_diffusion_model(str(path))
    recipe = model_import.recipe_of(model, WORKERS)
    base = weightless.build(recipe, lambda x, *_: x)
    remote = RemotePatcher.of(base, WORKERS, recipe, lambda x, *_: x)
    model_import.copy_state_from(model, remote)
    comfy.model_management.load_models_gpu([remote])
    del remote
    models: list[Any] = comfy.model_management.current_loaded_models
    (loaded,) = (one for one in models if one.real_model() is base)
    assert loaded.model is not None and loaded.model.model is base, "not the patcher of another model"
    del model, loaded
    gc.collect()
    with caplog.at_level(logging.INFO):
        comfy.model_management.cleanup_models_gc()
    assert "memory leak" not in caplog.text


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.std()).item()


def with_lora(model: ModelPatcher) -> ModelPatcher:
    shapes = {name: tuple(weight.shape) for name, weight in model.model.named_parameters()}
    return comfy.sd.load_lora_for_models(model, None, lora_for(shapes, ["lora"], 1), 1.0, 0)[0]


def loader(path: Path) -> ModelPatcher:
    return comfy.sd.load_diffusion_model(str(path))


def ray_loader(path: Path) -> ModelPatcher:
    return api.load(RayModel(WORKERS, ModelRecipe.of(str(path), "default")))


@pytest.mark.skipif(not hasattr(nodes_custom_sampler, "DualModelGuider"), reason="this ComfyUI has no such node")
@pytest.mark.usefixtures("as_comfyui_runs_nodes")
def test_two_models_of_one_file_in_one_run(path: Path) -> None:
    """Two loaders give two models; of two clones ComfyUI runs one, and so do the workers."""
    steps = 2
    first, second = loader(path), loader(path)
    expected, _ = sample(dual_model(with_lora(first), second), steps=steps)
    both, _ = sample(dual_model(with_lora(first), with_lora(first)), steps=steps)
    assert error(both, expected) > 0.1, "the LoRA changes nothing"
    for models in (
        (ray_loader(path), ray_loader(path)),
        tuple(api.parallelize(one, WORKERS) for one in (first, second)),
    ):
        actual, _ = sample(dual_model(with_lora(models[0]), models[1]), steps=steps)
        assert error(actual, expected) <= 1e-4
    one, stock = ray_loader(path), loader(path)
    for order in (slice(None), slice(None, None, -1)):
        expected, _ = sample(dual_model(*[with_lora(stock), stock][order]), steps=steps)
        actual, _ = sample(dual_model(*[with_lora(one), one][order]), steps=steps)
        assert error(actual, expected) <= 1e-4


def another_format(model: Any) -> None:
    model.latent_format = type(model.latent_format)()
    model.latent_format.scale_factor *= 1.5


BESIDE: dict[str, Callable[[Any], Any]] = {
    "shift": lambda model: model.model_sampling.set_parameters(shift=7.0),
    "method": lambda model: setattr(model.model_sampling, "calculate_input", lambda sigma, noise: noise * 0.9),
    "format of latents": another_format,
}


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.usefixtures("as_comfyui_runs_nodes")
def test_changes_in_place_beside_the_diffusion_model(name: str, path: Path) -> None:
    """They are of one MODEL, and not of the next of that file."""
    change, steps = BESIDE[name], 2
    changed, plain = loader(path), loader(path)
    change(changed.model)
    expected, _ = sample(equal_lengths(changed), steps=steps, masked=True)
    unchanged, _ = sample(equal_lengths(plain), steps=steps, masked=True)
    assert error(unchanged, expected) > 0.01, "the change does nothing"
    of_workers = ray_loader(path)
    change(of_workers.model)
    parallelized = api.parallelize(changed, WORKERS)
    again = api.parallelize(of_workers, WORKERS)
    runs = [(model, stays_here) for model in (of_workers, parallelized) for stays_here in (False, True)]
    for model, stays_here in (*runs, (again, False)):
        actual, _ = sample(equal_lengths(model), steps=steps, masked=True, stays_here=stays_here)
        assert error(actual, expected) <= 1e-4
    actual, _ = sample(equal_lengths(ray_loader(path)), steps=steps, masked=True)
    assert error(actual, unchanged) <= 1e-4


@pytest.mark.usefixtures("as_comfyui_runs_nodes")
def test_a_schedule_that_a_node_sets_for_a_run_and_puts_back(path: Path) -> None:
    steps, found = 2, []
    for model in (loader(path), ray_loader(path)):
        sampling, shifts = model.model.model_sampling, []
        before = sampling.shift
        for shift in (7.0, before):
            sampling.set_parameters(shift=shift)
            shifts.append(sample(equal_lengths(model), steps=steps)[0])
        found.append(shifts)
    assert error(found[0][0], found[0][1]) > 0.01
    for actual, expected in zip(found[1], found[0], strict=True):
        assert error(actual, expected) <= 1e-4


@pytest.mark.usefixtures("as_comfyui_runs_nodes")
def test_what_is_beside_the_diffusion_model_is_that_of_the_file(path: Path) -> None:
    """Of any model of it, also once it has sampled, and with an object patch that ComfyUI leaves on it."""
    model = loader(path)
    beside = weightless.baseline_of(ray_loader(path).model).beside
    assert beside.changed(model) == {}
    patched = model.clone()
    patched.add_object_patch("model_sampling", copy.deepcopy(model.model.model_sampling))
    patched.object_patches["model_sampling"].set_parameters(shift=7.0)
    sample(equal_lengths(patched), steps=1)
    assert beside.changed(patched) == beside.changed(model) == {}
