"""Loading a diffusion model in a worker, through ComfyUI's own loader."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import comfy.sd
import torch
from safetensors import SafetensorError

from raylight.parallel.process_group import smallest

from .recipe import ModelRecipe


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the driver must know of a model whose weights it does not have."""

    name: str
    class_name: str
    latent_format: Any


class RankPatcher(comfy.model_patcher.ModelPatcher):
    """A patcher that makes the same decisions on every rank."""

    def get_free_memory(self, device: torch.device) -> int:
        """Free bytes on the fullest rank. Collective.

        ComfyUI batches conditionings by what is free; ranks that batched differently would meet in
        collectives of different shapes.
        """
        return smallest(int(super().get_free_memory(device)))


def load(recipe: ModelRecipe) -> RankPatcher:
    """Load the model of a recipe. Raises ValueError, naming the file, when it cannot be one."""
    if not os.path.isfile(recipe.path):
        raise ValueError(f"the model file {recipe.path} is not there on the machine of this worker")
    try:
        patcher = comfy.sd.load_diffusion_model(recipe.path, model_options=_options(recipe.weight_dtype))
    except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f"{recipe.name} cannot be loaded as a diffusion model: {error}") from error
    return RankPatcher(patcher.model, patcher.load_device, patcher.offload_device)


def info(recipe: ModelRecipe, patcher: RankPatcher) -> ModelInfo:
    """The description of a loaded model."""
    return ModelInfo(recipe.name, type(patcher.model.diffusion_model).__name__, patcher.model.latent_format)


def _options(weight_dtype: str) -> dict[str, Any]:
    """The model options that ComfyUI's own UNETLoader makes of a weight dtype, and the two it lacks."""
    dtypes = {
        "default": {},
        "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
        "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
        "fp8_e5m2": {"dtype": torch.float8_e5m2},
        "bf16": {"dtype": torch.bfloat16},
        "fp16": {"dtype": torch.float16},
    }
    return dict(dtypes[weight_dtype])
