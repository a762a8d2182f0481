"""A model without weights: what ComfyUI's process needs of one whose weights are on workers.

It is the very class that ComfyUI builds for the file, with its configuration, latent format and sampling, and with
parameters that have shapes and no memory. Nodes that look at a model find what they look for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import comfy.model_management
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher

from . import model
from .mapped import set_parameter
from .recipe import ModelRecipe

# What ComfyUI calls of a diffusion model outside of its forward, with weights (LTX-2, Anima, MiniMax).
METHODS = ("preprocess_text_embeds",)

# Of the patcher that is sampled, a method, and its arguments.
Calls = Callable[[ModelPatcher, str, tuple[Any, ...], dict[str, Any]], Any]

_KEPT = 8
_built: OrderedDict[ModelRecipe, BaseModel] = OrderedDict()


def of(recipe: ModelRecipe, call: Calls) -> BaseModel:
    """The weightless model of a recipe, whose forward is `call(patcher, method, args, kwargs)`.

    The same object for the same file and options, which is read once, and of which only the header. Raises what
    `model.map_file` raises.
    """
    key = recipe.without_loras
    if key not in _built:
        _built[key] = _build(key, call)
        if len(_built) > _KEPT:
            _built.popitem(last=False)
    _built.move_to_end(key)
    return _built[key]


def _build(recipe: ModelRecipe, call: Calls) -> BaseModel:
    mapped = model.map_file(recipe)
    base = mapped.model
    diffusion_model = base.diffusion_model
    for name, parameter in list(diffusion_model.named_parameters()):
        dtype = mapped.dtypes.get(name, parameter.dtype)
        set_parameter(diffusion_model, name, torch.empty(parameter.shape, dtype=dtype, device="meta"))
    for method in ("forward", *METHODS):
        if hasattr(diffusion_model, method):
            setattr(diffusion_model, method, _Method(base, method, call))
    base.device = comfy.model_management.unet_offload_device()
    return base


class _Method:
    """One method of the diffusion model, done elsewhere."""

    def __init__(self, base: BaseModel, name: str, call: Calls) -> None:
        self._base = base
        self._name = name
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._base.current_patcher is None:
            raise RuntimeError(f"{type(self._base.diffusion_model).__name__} runs on workers, and was called here "
                               f"outside of sampling")
        return self._call(self._base.current_patcher, self._name, args, kwargs)
