"""How workers get a VAE of ComfyUI's process: from its file, if that still has its weights, else from memory."""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.float
import comfy.lora
import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from raylight.host.exported import ALIGNMENT
from raylight.host.log_messages import first_few, gb
from raylight.host.recipe import Export
from raylight.host.tensor_file import DTYPES
from raylight.host.vae_file import map_vae, structure
from raylight.host.vae_jobs import VaeRecipe
from raylight.sharding.alignment import aligned

from . import stock_weights
from .memory_file import MemoryFile
from .tensors_in_memory import write_tensors

logger = logging.getLogger(__name__)

# Of ComfyUI's VAE: what decides how it decodes and encodes, beside the model.
_ATTRIBUTES = ("latent_channels", "latent_dim", "output_channels", "crop_input", "not_video", "pad_channel_value")
_FUNCTIONS = ("process_input", "process_output")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LOADER = getattr(comfy.sd, "load_vae_patcher", None)  # ComfyUI 0.27 and later note it on the patcher


class CannotBuild(ValueError):
    """Workers cannot build the VAE; the message says why."""


@dataclass(slots=True)
class _Source:
    """Where workers get a VAE's weights, what the weights were at that time, and the file of an export."""

    state: Any
    recipe: VaeRecipe
    file: MemoryFile | None


# By the VAE's model.
_sources: weakref.WeakKeyDictionary[nn.Module, _Source] = weakref.WeakKeyDictionary()


def recipe_of(vae: Any, dtype: str, path: str = "") -> VaeRecipe:
    """Return how workers get the same VAE, with its patches, and compute in `dtype`. `path` is its file, if known.

    Raises CannotBuild; ValueError if memory has no room for an export; and ComfyUI's interrupt if the user cancels.
    """
    model = vae.first_stage_model
    if changed := _changed_code(vae):
        raise CannotBuild(f"a node has changed the code of its {changed}")
    with stock_weights.unpatched(vae.patcher) as base:
        weights = stock_weights.weights_within(base)
        patches = vae.patcher.patches_uuid if vae.patcher.patches else None
        state = dtype, patches, stock_weights.digests_of(weights)
        source = _sources.get(model)
        if source is None or source.state != state or not source.recipe.is_there:
            _sources.pop(model, None)  # to make room
            source = _sources[model] = _Source(state, *_find(vae, weights, dtype, path))
    return source.recipe


def _changed_code(vae: Any) -> str:
    """Return the function or the path of a module that a node has replaced or hooked, "" if there is none."""
    for name in _FUNCTIONS:
        if getattr(vae, name).__module__ != comfy.sd.__name__:
            return name
    for path, module in vae.first_stage_model.named_modules():
        is_replaced = not {"forward", "decode", "encode"}.isdisjoint(vars(module))
        if is_replaced or module._forward_hooks or module._forward_pre_hooks:
            return f"module {path or type(module).__name__}"
    return ""


def _find(vae: Any, weights: Mapping[str, Tensor], dtype: str, path: str) -> tuple[VaeRecipe, MemoryFile | None]:
    init: Any = getattr(vae.patcher, "cached_patcher_init", None)
    metadata = None
    if init is not None and _LOADER is not None and init[0] is _LOADER:
        path, metadata = path or init[1][0], init[1][1]
    if path and not vae.patcher.patches:
        try:
            recipe = VaeRecipe.of_file(path, dtype)
            changed = _difference(vae, weights, recipe)
        except (FileNotFoundError, ValueError) as error:  # deleted or replaced since; ComfyUI has the weights
            changed = str(error)
        else:
            if not changed:
                return recipe, None
        logger.info("the VAE in ComfyUI's memory is no longer that of %s: %s", path, changed)
    recipe, file = _export(vae, _patched(vae, weights), dtype, metadata)
    try:
        changed = _difference(vae, {}, recipe)
    except ValueError as error:
        changed = str(error)
    if changed:
        file.close()
        raise CannotBuild(f"workers cannot build it of its weights alone: {changed}")
    return recipe, file


def _difference(vae: Any, weights: Mapping[str, Tensor], recipe: VaeRecipe) -> str:
    """Return in what the VAE of a recipe differs from one in this process, "" if in nothing; in its weights, too, if
    `weights` are given. Raises ValueError as `map_vae`.
    """
    mapped = map_vae(recipe)
    theirs, ours = structure(mapped.vae.first_stage_model), structure(vae.first_stage_model)
    if theirs != ours:
        first = next((path or kind for path, kind in ours if (path, kind) not in theirs), "")
        return f"it has other modules{f', such as {first}' if first else ''}"
    for name in _ATTRIBUTES:
        value, of_file = getattr(vae, name, None), getattr(mapped.vae, name, None)
        if value != of_file:
            return f"its {name} is {value}, and not {of_file}"
    if not weights:
        return ""
    of_file = stock_weights.weights_within(mapped.vae.first_stage_model)
    changed = [name for name in stock_weights.differing(weights, of_file) if name not in mapped.missing]
    return f"other weights: {first_few(changed)}" if changed else ""


def _patched(vae: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with the patches of the VAE's patcher, as ComfyUI applies them when it loads the VAE."""
    found = dict(weights)
    for key, patches in vae.patcher.patches.items():
        if key not in found:
            continue
        weight = found[key]
        start = comfy.model_management.cast_to_device(weight, vae.device, torch.float32, copy=True)
        patched = comfy.lora.calculate_weight(patches, start, key)
        found[key] = comfy.float.stochastic_rounding(patched, weight.dtype, seed=comfy.utils.string_to_seed(key))
    return found


def _export(vae: Any, weights: Mapping[str, Tensor], dtype: str, metadata: Any) -> tuple[VaeRecipe, MemoryFile]:
    """Write weights to memory that all workers map, as a .safetensors file."""
    kind = type(vae.first_stage_model).__name__
    entries: dict[str, Any] = {"__metadata__": metadata or {"tae_latent_channels": vae.latent_channels}}
    end = 0
    for name, value in weights.items():
        if is_traceable_wrapper_subclass(value) or value.dtype not in _NAMES:
            raise CannotBuild(f"its weight {name} is a {type(value).__name__} of {value.dtype}")
        entries[name] = {
            "dtype": _NAMES[value.dtype],
            "shape": tuple(value.shape),
            "data_offsets": (end, end + value.nbytes),
        }
        end += aligned(value.nbytes, ALIGNMENT)
    header = json.dumps(entries).encode()
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    placed = ((entries[name]["data_offsets"][0], value) for name, value in weights.items())
    file = write_tensors(kind, len(header).to_bytes(8, "little") + header, placed, end)
    logger.info(
        "the workers get the weights of the VAE (%s) from ComfyUI's memory: this takes %s once for all of them, in %s",
        kind,
        gb(file.nbytes),
        file.where,
    )
    return VaeRecipe.of_file(file.path, dtype, Export(f"{kind} (from memory)", b"")), file
