"""The drop-in MODEL among the models that ComfyUI has loaded."""

from __future__ import annotations

import gc
import inspect
import logging
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher

from raylight.cluster.config import SessionConfig
from raylight.dev.demo.tiny import write_checkpoint
from raylight.driver import model_import, weightless
from raylight.driver.remote_model import RemotePatcher
from raylight.host.recipe import ModelRecipe, WorkerConfig
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
