"""LoRA files, read and checked by ComfyUI's own means in a worker."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.lora_convert
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from raylight.cluster.errors import is_out_of_memory

from . import tensor_file
from .fitting import Fitting, in_words
from .recipe import LoraRecipe
from .telling import held_back, some

Patches = dict[Any, Any]

# How the names begin that trainers give to what is for a text encoder.
_TEXT = ("lora_te", "lora_prior_te", "text_encoder", "text_model", "te_", "te1_", "te2_", "clip_", "t5xxl.",
         "conditioner.", "cond_stage_model.", "bundle_emb.")
_NOT_LOADED = "lora key not loaded: "


@dataclass(slots=True)
class Fitted:
    """What ComfyUI's `ModelPatcher.add_patches` takes, of a LoRA, and sentences that a person is to be told."""

    patches: Patches
    warnings: list[str]


def read(recipe: LoraRecipe, keys: Mapping[str, Any], model: Fitting) -> Fitted:
    """A LoRA file, for a model of whose weights `keys` has the names in LoRA files.

    Raises ValueError, naming the file, where it cannot be read, has nothing that fits the model, or is one at which
    ComfyUI would end the run.
    """
    if not os.path.isfile(recipe.path):
        raise ValueError(f"the LoRA file {recipe.path} is not there on the machine of this worker")
    try:
        tensors = tensor_file.read(recipe.path)
    except Exception as error:  # of safetensors, pickle, zip, the system: whatever the file is instead
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{recipe.name} cannot be read as a LoRA: {tensor_file.in_words(error)}") from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{recipe.name} cannot be read as a LoRA: it holds no tensors by name")
    return fitted(recipe.name, tensors, keys, model)


def fitting(name: str, tensors: dict[str, Tensor], keys: Mapping[str, Any],
            shapes: Mapping[str, tuple[int, ...]]) -> Patches:
    """The patches of a LoRA that is in memory already, for weights of these shapes. Raises as `read`."""
    return fitted(name, tensors, keys, Fitting(shapes)).patches


def fitted(name: str, tensors: dict[str, Tensor], keys: Mapping[str, Any], model: Fitting) -> Fitted:
    """`read` for a LoRA that is in memory already."""
    if not tensors:
        raise ValueError(f"the LoRA {name} is empty: it holds no tensors")
    names = list(tensors)
    try:
        with held_back(_NOT_LOADED) as lines:
            patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(tensors)), dict(keys))
    except Exception as error:  # of ComfyUI's adapters, which look for their tensors by name
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{name} cannot be read as a LoRA: {tensor_file.in_words(error)}") from error
    found = {key: value for key, value in patches.items() if _target(key) in model}
    if not found:
        raise ValueError(_without_effect(name, names))
    misfits = put_in_place_of_misfits(name, found, model)
    if len(misfits) == len(found):
        raise ValueError(f"the LoRA {name} is for another model, or another size of this one: none of its {len(found)} "
                         f"layers fits ({_places(misfits, model)})")
    warnings = []
    if misfits:
        warnings.append(f"the LoRA {name} fits in part: {len(misfits)} of its {len(found)} layers do not fit "
                        f"the model and are left out ({_places(misfits, model)})")
    nowhere = [line.removeprefix(_NOT_LOADED) for line in lines]
    nowhere += [_target(key) for key in patches if key not in found]
    nowhere = [one for one in nowhere if not _is_for_text(one)]
    if nowhere:
        warnings.append(f"the LoRA {name} has {len(nowhere)} tensors or layers that this model does not have, "
                        f"and is put on without them ({some(nowhere)})")
    return Fitted(found, warnings)


def put_in_place_of_misfits(name: str, patches: Patches, model: Fitting) -> list[str]:
    """Replace what does not fit the model by patches that change nothing; returns the weights that these are for.

    Raises ValueError where ComfyUI would end the run.
    """
    misfits = []
    for key, value in patches.items():
        part, function = (None, None) if isinstance(key, str) else (*key[1:], None, None)[:2]
        try:
            fits = model.fits(_target(key), value, part, function)
        except ValueError as error:
            raise ValueError(f"the LoRA {name} is damaged or for another model: {error}") from error
        if not fits:
            misfits.append(_target(key))
            patches[key] = model.nothing(_target(key), part)
    return misfits


def put_on_weights(patches: Mapping[str, Sequence[Any]], model: Fitting,
                   what: str = "what LoRAs and patches change") -> tuple[dict[str, list[Any]], list[str]]:
    """Patches in the form of ComfyUI's patcher, by weight, of which those that do not fit are replaced as above; and
    sentences that a person is to be told of `what`. Raises ValueError where ComfyUI would end the run."""
    made: dict[str, list[Any]] = {}
    misfits = []
    for key, of_weight in patches.items():
        made[key] = []
        for strength, value, strength_model, part, function in of_weight:
            try:
                fits = model.fits(key, value, part, function)
            except ValueError as error:
                raise ValueError(f"a LoRA or patch on the model is damaged or for another model: {error}") from error
            if not fits:
                misfits.append(key)
                value = model.nothing(key, part)
            made[key].append((strength, value, strength_model, part, function))
    if not misfits:
        return made, []
    total = sum(map(len, patches.values()))
    return made, [f"{what} fits in part: {len(misfits)} of {total} layers do not fit the model and are left out "
                  f"({_places(misfits, model)})"]


def fit_scheduled(patcher: ModelPatcher) -> list[str]:
    """Have the LoRAs that come and go between steps (hooks) be left out where they do not fit; what is to be told.
    Raises ValueError where ComfyUI would end the run."""
    warnings = []
    if patcher.hook_patches:
        shapes = {name: tuple(parameter.shape) for name, parameter in patcher.model.named_parameters()}
        for hook, patches in patcher.hook_patches.items():
            known = {key: of_weight for key, of_weight in patches.items() if key in shapes}
            patcher.hook_patches[hook], more = put_on_weights(known, Fitting(shapes), "the scheduled LoRA")
            warnings += more
    return warnings


def _target(key: Any) -> str:
    """The weight that is patched: keys are its name, or a tuple of name, part and function."""
    return key if isinstance(key, str) else key[0]


def _places(names: Iterable[str], model: Fitting) -> str:
    return some(f"{name}, here {in_words(model.shape(name))}" for name in dict.fromkeys(names))


def _is_for_text(name: str) -> bool:
    return name.startswith(_TEXT)


def _without_effect(name: str, names: Sequence[str]) -> str:
    """Why a LoRA of which nothing has a place would change nothing."""
    of_model = [one for one in names if not _is_for_text(one)]
    if not of_model:
        return (f"the LoRA {name} is for the text encoder only, and has nothing for the diffusion model: load it with "
                f"Load LoRA on the CLIP, and leave it out here")
    return (f"the LoRA {name} has no effect on this model: ComfyUI knows none of the names of its {len(of_model)} "
            f"tensors ({some(of_model)}) for it. It is for another model, or was saved by a tool whose names ComfyUI "
            f"does not know: take a version of it that is made for ComfyUI")
