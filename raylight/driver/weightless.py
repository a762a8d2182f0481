"""A model that others run: what ComfyUI's process needs of one whose weights are on workers.

It is the very class that ComfyUI builds for the file, with its configuration, latent format and sampling. Its weights
are those in the memory-mapped file, which are read only if a node computes with them. Nodes that look at a model find
what they look for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import comfy.model_management
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher

from raylight.host import loading
from raylight.host.jobs import METHODS
from raylight.host.recipe import ModelRecipe
from raylight.sharding.assign import set_parameter
from raylight.sharding.lazy_concat import LazyConcat

from .baseline import Baseline

# Of the patcher that is sampled, a method, and its arguments.
Calls = Callable[[ModelPatcher, str, tuple[Any, ...], dict[str, Any]], Any]

_KEPT = 8
_BASELINE = "raylight_baseline"
_built: OrderedDict[ModelRecipe, BaseModel] = OrderedDict()


def build(recipe: ModelRecipe, call: Calls) -> BaseModel:
    """The model of a recipe, whose forward is `call(patcher, method, args, kwargs)`.

    The same object for the same file and options, which is read once, and of which only the header; another one where
    nodes have changed it, as a loader of ComfyUI gives a model that nobody has changed. Raises what `loading.map_file`
    raises.
    """
    key = recipe.without_loras
    if key not in _built or baseline_of(_built[key]).is_changed(_built[key]):
        _built[key] = _build(key, call)
        if len(_built) > _KEPT:
            _built.popitem(last=False)
    _built.move_to_end(key)
    return _built[key]


def baseline_of(base: BaseModel) -> Baseline:
    """What a model of `build` was before nodes had it."""
    return getattr(base, _BASELINE)


def forget(base: BaseModel) -> None:
    """Build the model of this file anew when it is asked for the next time."""
    for recipe in [recipe for recipe, built in _built.items() if built is base]:
        del _built[recipe]


def forget_file(path: str) -> None:
    """Let go of the models of a file that is no longer there."""
    for recipe in [one for one in _built if one.path == path]:
        _built.pop(recipe, None)


def _build(recipe: ModelRecipe, call: Calls) -> BaseModel:
    # ComfyUI runs nodes in inference mode, and what is made there does not know whether it was written to.
    with torch.inference_mode(False), torch.no_grad():
        mapped = loading.map_file(recipe)
    base = mapped.model
    diffusion_model = base.diffusion_model
    for name, parameter in list(diffusion_model.named_parameters()):
        if isinstance(parameter, LazyConcat):  # lies in several tensors of the file
            dtype = mapped.dtypes.get(name, parameter.dtype)
            set_parameter(diffusion_model, name, torch.empty(parameter.shape, dtype=dtype, device="meta"))
    for module in diffusion_model.modules():
        if hasattr(module, "comfy_cast_weights"):  # whoever calls it has what the model computes with, not the file
            module.comfy_cast_weights = True
    for method in ("forward", *METHODS):
        if hasattr(diffusion_model, method):
            setattr(diffusion_model, method, Method(base, method, call))
    base.device = comfy.model_management.unet_offload_device()
    object.__setattr__(base, _BASELINE, Baseline(base))
    return base


class Method:
    """One method of the diffusion model, done elsewhere. In a worker it is that of the model there."""

    def __init__(self, base: BaseModel, name: str, call: Calls) -> None:
        self._base = base
        self._name = name
        self._call = call

    def __reduce__(self) -> Any:
        return getattr, (self._base.diffusion_model, self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._base.current_patcher is None:
            raise RuntimeError(
                f"{type(self._base.diffusion_model).__name__} runs on workers, and was called here outside of sampling"
            )
        return self._call(self._base.current_patcher, self._name, args, kwargs)
