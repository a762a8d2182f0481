"""The model in ComfyUI's process of one whose weights are on workers.

It is of the class that ComfyUI builds for the file, with its configuration, latent format and sampling. Its weights are
those in the memory-mapped file, read only if a node computes with them, so nodes find all that they look for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import torch
from comfy.model_base import BaseModel

from raylight.host import loading
from raylight.host.jobs import METHODS
from raylight.host.recipe import ModelRecipe
from raylight.sharding.assign import set_parameter
from raylight.sharding.lazy_concat import LazyConcat

from . import layers_here
from .baseline import Baseline

# Takes the patcher that is sampled, the name of a method, and its arguments.
Call = Callable[[Any, str, tuple[Any, ...], dict[str, Any]], Any]

_CASTS = "comfy_cast_weights"
_BASELINE = "raylight_baseline"


def build(recipe: ModelRecipe, call: Call) -> BaseModel:
    """Return the model of a recipe, whose forward is `call(patcher, method, args, kwargs)`.

    Each call gives another one, as ComfyUI's loaders do: it has the patcher that samples it, and what nodes change on
    it, to itself. It costs the reading of the file's header. Raises what `loading.map_file` raises.
    """
    # ComfyUI runs nodes in inference mode, in which PyTorch does not count writes to a tensor.
    with torch.inference_mode(False), torch.no_grad():
        mapped = loading.map_file(recipe.without_loras)
    base = mapped.model
    diffusion_model = base.diffusion_model
    for name, parameter in list(diffusion_model.named_parameters()):
        if isinstance(parameter, LazyConcat):  # stored in several tensors of the file
            dtype = mapped.dtypes.get(name, parameter.dtype)
            set_parameter(diffusion_model, name, torch.empty(parameter.shape, dtype=dtype, device="meta"))
    for module in diffusion_model.modules():
        if hasattr(module, _CASTS):  # a caller has the dtype of the computation, not of the file
            setattr(module, _CASTS, True)
    for method in ("forward", *METHODS):
        if hasattr(diffusion_model, method):
            setattr(diffusion_model, method, Method(base, method, call))
    layers_here.watch(diffusion_model)
    base.device = comfy.model_management.unet_offload_device()
    object.__setattr__(base, _BASELINE, Baseline(base))
    return base


def baseline_of(base: BaseModel) -> Baseline:
    """Return what a model of `build` was before nodes used it."""
    return getattr(base, _BASELINE)


class Method:
    """A method of the diffusion model that is done by workers. Serialized, it is the method of the worker's model."""

    def __init__(self, base: BaseModel, name: str, call: Call) -> None:
        self._base = base
        self._name = name
        self._call = call

    def __reduce__(self) -> Any:
        return getattr, (self._base.diffusion_model, self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._base.current_patcher is None:
            raise RuntimeError(
                f"{type(self._base.diffusion_model).__name__} runs on workers, and was called in "
                f"ComfyUI's process outside of sampling: use a sampler of ComfyUI's such as KSampler instead of a node "
                f"that calls the model itself, or a MODEL without workers"
            )
        return self._call(self._base.current_patcher, self._name, args, kwargs)
