"""LoRA files, read and checked by ComfyUI's own means in a worker."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.utils
from comfy.weight_adapter import LoHaAdapter, LoRAAdapter
from torch import Tensor

from .recipe import LoraRecipe

logger = logging.getLogger(__name__)


def read(recipe: LoraRecipe, keys: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[Any, Any]:
    """What ComfyUI's `ModelPatcher.add_patches` takes, of a LoRA file for a model whose weights have these LoRA names
    and shapes (both by their names in the state dict).

    Raises ValueError, naming the file, where it cannot be read, or is for another model.
    """
    if not os.path.isfile(recipe.path):
        raise ValueError(f"the LoRA file {recipe.path} is not there on the machine of this worker")
    try:
        tensors = comfy.utils.load_torch_file(recipe.path, safe_load=True)
    except Exception as error:  # of safetensors, pickle, zip, the system: whatever the file is instead
        raise ValueError(f"{recipe.name} cannot be read as a LoRA: {error}") from error
    return fitting(recipe.name, tensors, keys, shapes)


def fitting(name: str, tensors: dict[str, Tensor], keys: Mapping[str, Any],
            shapes: Mapping[str, tuple[int, ...]]) -> dict[Any, Any]:
    """`read` for a LoRA that is in memory already."""
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(tensors), dict(keys))
    found = {key: value for key, value in patches.items() if _target(key) in shapes}
    if not found:
        raise ValueError(f"the LoRA {name} is for another model: none of its {len(tensors)} tensors has a place in "
                         f"this one")
    for key, value in found.items():
        _check_shape(name, key, value, shapes[_target(key)])
    return found


def _target(key: Any) -> str:
    """The weight that is patched: keys are its name, or a tuple of name, part and function."""
    return key if isinstance(key, str) else key[0]


def _check_shape(lora: str, key: Any, value: Any, shape: tuple[int, ...]) -> None:
    wanted = list(shape)
    if not isinstance(key, str) and key[1] is not None:
        dim, _, length = key[1]
        wanted[dim] = length
    made = _made(value)
    if made is not None and made != math.prod(wanted):
        raise ValueError(f"the LoRA {lora} is for another model: what it has for {_target(key)} does not fit a weight "
                         f"of {' x '.join(map(str, wanted))}")


def _made(value: Any) -> int | None:
    """The number of elements that a patch makes; None where only applying it tells."""
    if isinstance(value, LoRAAdapter):
        up, down, _, mid, _, reshape = value.weights
        if reshape is not None or mid is not None:
            return None
        return _product(up.flatten(1), down.flatten(1))
    if isinstance(value, LoHaAdapter):
        w1a, w1b, _, w2a, w2b, t1, _, _ = value.weights
        if t1 is not None:
            return None
        made = _product(w1a, w1b)
        return made if made == _product(w2a, w2b) else -1
    if isinstance(value, tuple) and value[0] == "set":
        return value[1][0].numel()
    return None


def _product(left: Tensor, right: Tensor) -> int:
    return left.shape[0] * right.shape[1] if left.shape[1] == right.shape[0] else -1
