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
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from raylight.host.exported import ALIGNMENT
from raylight.host.foreign_code import is_comfys, node_name_of, replaced_in
from raylight.host.log_messages import first_few, gb
from raylight.host.recipe import Export
from raylight.host.tensor_file import DTYPES
from raylight.host.vae_file import MappedVae, map_vae, structure
from raylight.host.vae_jobs import VaeRecipe
from raylight.sharding.alignment import aligned

from . import stock_weights
from .baseline import ModuleState, differences
from .memory_file import MemoryFile
from .tensors_in_memory import write_tensors

logger = logging.getLogger(__name__)
_CPU = torch.device("cpu")

# Of ComfyUI's VAE: what decides how it decodes and encodes, beside the model.
_ATTRIBUTES = (
    "latent_channels",
    "latent_dim",
    "output_channels",
    "crop_input",
    "not_video",
    "pad_channel_value",
    "downscale_ratio",
    "upscale_ratio",
    "process_input",
    "process_output",
)
# Of its patcher: what decides so, beside patches of weights, which are sent.
_PATCHES = ("object_patches", "weight_wrapper_patches", "injections")
# What it notes on its model, also of how much is loaded.
_OF_PATCHER = frozenset(vars(ModelPatcher(nn.Module(), _CPU, _CPU, size=1).model))
# The attribute in which layers have ComfyUI's choice of an attention; workers choose theirs.
_ATTENTION = "optimized_attention"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LOADER = getattr(comfy.sd, "load_vae_patcher", None)  # ComfyUI 0.27 and later note it on the patcher


class CannotBuild(ValueError):
    """Workers cannot build the VAE; the message says why."""


@dataclass(frozen=True, slots=True)
class _Built:
    """What workers build: the modules by path, without their weights, and the VAE's own attributes."""

    modules: Mapping[str, ModuleState]
    attributes: Mapping[str, Any]

    @classmethod
    def of(cls, mapped: MappedVae) -> _Built:
        model = mapped.vae.first_stage_model.to("meta")
        modules = {path: ModuleState.of(module) for path, module in model.named_modules()}
        return cls(modules, {name: _comparable(getattr(mapped.vae, name, None)) for name in _ATTRIBUTES})

    def difference(self, vae: Any) -> str:
        """Return the first attribute, module or hook of a VAE that differs from what workers build, "" if none does."""
        for name, built in self.attributes.items():
            if _comparable(getattr(vae, name, None)) != built:
                return name
        modules = dict(vae.first_stage_model.named_modules())
        if different := sorted(modules.keys() ^ self.modules.keys()):
            return f"modules ({first_few(different)})"
        for path, module in modules.items():
            try:
                changes = list(differences(path, self.modules[path], module))
            except ValueError:  # it is of another class
                return f"module {path}"
            for change in changes:
                is_noted = path == "" and change.name in _OF_PATCHER
                if not is_noted and (change.name != _ATTENTION or not is_comfys(change.value)):
                    return change.place
        return ""


@dataclass(slots=True)
class _Source:
    """Where workers get a VAE's weights, what the weights were at that time, what they build, and an export's file."""

    state: Any
    recipe: VaeRecipe
    built: _Built
    file: MemoryFile | None


# By the VAE's model.
_sources: weakref.WeakKeyDictionary[nn.Module, _Source] = weakref.WeakKeyDictionary()


def recipe_of(vae: Any, dtype: str, path: str = "") -> VaeRecipe:
    """Return how workers get the same VAE, with its patches, and compute in `dtype`. `path` is its file, if known.

    Raises CannotBuild; ValueError if memory has no room for an export; and ComfyUI's interrupt if the user cancels.
    """
    model = vae.first_stage_model
    if changed := _replaced(vae):
        raise CannotBuild(f"a node has changed {changed}")
    with stock_weights.unpatched(vae.patcher) as base:
        weights = stock_weights.weights_within(base)
        patches = vae.patcher.patches_uuid if vae.patcher.patches else None
        state = dtype, patches, stock_weights.digests_of(weights)
        source = _sources.get(model)
        if source is None or source.state != state or not source.recipe.is_there:
            _sources.pop(model, None)  # to make room
            source = _sources[model] = _Source(state, *_find(vae, weights, dtype, path))
        changed = source.built.difference(vae)  # at each use: nodes change a VAE that others have used before
    if changed:
        reason = "" if source.file is None else ", or its weights do not tell how it is built"
        raise CannotBuild(f"a node has changed its {changed}{reason}")
    return source.recipe


def _replaced(vae: Any) -> str:
    """Return what nodes have replaced of this VAE outside of its modules, or of its classes, "" if nothing."""
    if vae.patcher.model is not vae.first_stage_model:
        return "its first_stage_model"
    if name := next((name for name in _PATCHES if getattr(vae.patcher, name, None)), ""):
        return f"it by the {name} of its patcher"
    kinds = {type(module): None for module in vae.first_stage_model.modules()}
    try:
        change = next(replaced_in((comfy.sd.VAE, *kinds)), None)
    except ValueError as error:
        return f"ComfyUI's code: {error}"
    return "" if change is None else f"ComfyUI's code: {change.place} is now of {node_name_of(change.value)}"


def _comparable(value: Any) -> Any:
    """Return what is equal for two builds: of functions, also in a tuple, their code."""
    if isinstance(value, tuple):
        return tuple(map(_comparable, value))
    return getattr(value, "__code__", value)


def _find(
    vae: Any, weights: Mapping[str, Tensor], dtype: str, path: str
) -> tuple[VaeRecipe, _Built, MemoryFile | None]:
    init: Any = getattr(vae.patcher, "cached_patcher_init", None)
    metadata = None
    if init is not None and _LOADER is not None and init[0] is _LOADER:
        path, metadata = path or init[1][0], init[1][1]
    if path and not vae.patcher.patches:
        try:
            recipe = VaeRecipe.of_file(path, dtype)
            mapped = map_vae(recipe)
            changed = _other_modules(vae, mapped) or _other_weights(weights, mapped)
        except (FileNotFoundError, ValueError) as error:  # deleted or replaced since; ComfyUI has the weights
            changed = str(error)
        else:
            if not changed:
                return recipe, _Built.of(mapped), None
        logger.info("the VAE in ComfyUI's memory is no longer that of %s: %s", path, changed)
    recipe, file = _export(vae, _patched(vae, weights), dtype, metadata)
    try:
        mapped = map_vae(recipe)
        changed = _other_modules(vae, mapped)
    except ValueError as error:
        changed = str(error)
    if changed:
        file.close()
        raise CannotBuild(f"workers cannot build it of its weights alone: {changed}")
    return recipe, _Built.of(mapped), file


def _other_modules(vae: Any, mapped: MappedVae) -> str:
    theirs, ours = structure(mapped.vae.first_stage_model), structure(vae.first_stage_model)
    if theirs == ours:
        return ""
    first = next((path or kind for path, kind in ours if (path, kind) not in theirs), "")
    return f"it has other modules{f', such as {first}' if first else ''}"


def _other_weights(weights: Mapping[str, Tensor], mapped: MappedVae) -> str:
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
