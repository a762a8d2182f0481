"""Which patches (LoRA and its kin) fit the weights that they are for.

ComfyUI finds out when it changes a weight: most patches that do not fit it leaves out, with an error in its log for
each, and at some it ends the run. Here its own calculation is tried before, on tensors without memory, so that a person
is told once and a run that would end is refused before it begins.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.weight_adapter
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from raylight.cluster.errors import is_out_of_memory
from raylight.host import tensor_file
from raylight.host.log_messages import captured_log, first_few
from raylight.host.recipe import LoraRecipe

_META = torch.device("meta")
# ComfyUI's patches that are no adapters, of which a LoRA file can have these.
_PLAIN = ("diff", "set")

Part = tuple[int, int, int] | None  # of a weight: dimension, start, length


class Fitting:
    """The weights of one model, on which patches are tried in their order: some change a weight's shape."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = dict(shapes)
        self._tried: dict[Any, tuple[bool, tuple[int, ...]]] = {}  # most layers of a model are alike

    def shape(self, key: str) -> tuple[int, ...]:
        """A weight's shape after the patches so far."""
        return self._shapes[key]

    def __contains__(self, key: str) -> bool:
        return key in self._shapes

    def fits(self, key: str, value: Any, part: Part = None, function: Any = None) -> bool:
        """Whether ComfyUI applies a patch to the weight `key`, or to a part of it. What only the real weight can tell
        is taken to fit.

        Raises ValueError where ComfyUI would end the run.
        """
        patch = _weightless(value)
        if patch is None:
            return True
        case = (_outline(patch), self._shapes[key], part, function)
        if case not in self._tried:
            self._tried[case] = _try(patch, key, *case[1:])
        fits, self._shapes[key] = self._tried[case]
        return fits

    def nothing(self, key: str, part: Part = None) -> Any:
        """A patch for the place of one that does not fit: ComfyUI rounds a quantised weight anew where there is any."""
        shape = list(self.shape(key))
        if part is not None:
            shape[part[0]] = part[2]
        return "diff", (torch.zeros(()).expand(shape),)


def _try(patch: Any, key: str, shape: tuple[int, ...], part: Part, function: Any) -> tuple[bool, tuple[int, ...]]:
    """Whether ComfyUI applies a patch of weightless tensors to a weight of this shape, and the shape then."""
    with torch.inference_mode(False), torch.no_grad(), captured_log("") as told:
        before = torch.empty(shape, device=_META)
        version = before._version
        try:
            after = comfy.lora.calculate_weight([(1.0, patch, 1.0, part, function)], before, key)
        except Exception as error:  # whatever its adapters make of such a patch
            if _is_about_meta(str(error)):
                return True, shape
            raise ValueError(
                f"what it has for {key} cannot be put on a weight of {in_words(shape)}: {error}"
            ) from error
    # A weight that was changed in place counts its changes.
    fits = after is not before or after._version > version or any(map(_is_about_meta, told))
    return fits, tuple(after.shape)


def in_words(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one number"


def _weightless(value: Any) -> Any:
    """The same patch with tensors that have no memory; None where it is of a kind that cannot be tried so."""
    if type(value) in comfy.weight_adapter.adapters:
        weights = [_on_meta(weight) for weight in value.weights]
        if value.name in ("oft", "boft") and isinstance(weights[2], (int, float)):
            weights[2] = 0.0  # the limit of a rotation, with which numbers are compared
        return type(value)(value.loaded_keys, tuple(weights))
    if isinstance(value, tuple) and len(value) == 2 and value[0] in _PLAIN:
        return value[0], tuple(_on_meta(one) for one in value[1])
    return None


def _outline(patch: Any) -> Any:
    """What of a weightless patch decides whether it fits."""
    kind, parts = (patch[0], patch[1]) if isinstance(patch, tuple) else (type(patch), patch.weights)
    return kind, tuple(
        (tuple(one.shape), one.dtype) if isinstance(one, Tensor) else type(one) if isinstance(one, float) else repr(one)
        for one in parts
    )


def _on_meta(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype, device=_META) if isinstance(value, Tensor) else value


def _is_about_meta(text: str) -> bool:
    """Whether an error comes of the trial, and not of what is tried."""
    return "meta tensor" in text or "'Meta'" in text or "Meta backend" in text


Patches = dict[Any, Any]

# How the names begin that trainers give to what is for a text encoder.
_TEXT = (
    "lora_te",
    "lora_prior_te",
    "text_encoder",
    "text_model",
    "te_",
    "te1_",
    "te2_",
    "clip_",
    "t5xxl.",
    "conditioner.",
    "cond_stage_model.",
    "bundle_emb.",
)
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
        raise ValueError(f"{recipe.name} cannot be read as a LoRA: {tensor_file.describe_error(error)}") from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{recipe.name} cannot be read as a LoRA: it holds no tensors by name")
    return fitted(recipe.name, tensors, keys, model)


def fitting(
    name: str, tensors: dict[str, Tensor], keys: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> Patches:
    """The patches of a LoRA that is in memory already, for weights of these shapes. Raises as `read`."""
    return fitted(name, tensors, keys, Fitting(shapes)).patches


def fitted(name: str, tensors: dict[str, Tensor], keys: Mapping[str, Any], model: Fitting) -> Fitted:
    """`read` for a LoRA that is in memory already."""
    if not tensors:
        raise ValueError(f"the LoRA {name} is empty: it holds no tensors")
    names = list(tensors)
    try:
        with captured_log(_NOT_LOADED) as lines:
            patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(tensors)), dict(keys))
    except Exception as error:  # of ComfyUI's adapters, which look for their tensors by name
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{name} cannot be read as a LoRA: {tensor_file.describe_error(error)}") from error
    found = {key: value for key, value in patches.items() if _target(key) in model}
    if not found:
        raise ValueError(_without_effect(name, names))
    misfits = put_in_place_of_misfits(name, found, model)
    if len(misfits) == len(found):
        raise ValueError(
            f"the LoRA {name} is for another model, or another size of this one: none of its {len(found)} "
            f"layers fits ({_places(misfits, model)})"
        )
    warnings = []
    if misfits:
        warnings.append(
            f"the LoRA {name} fits in part: {len(misfits)} of its {len(found)} layers do not fit "
            f"the model and are left out ({_places(misfits, model)})"
        )
    nowhere = [line.removeprefix(_NOT_LOADED) for line in lines]
    nowhere += [_target(key) for key in patches if key not in found]
    nowhere = [one for one in nowhere if not _is_for_text(one)]
    if nowhere:
        warnings.append(
            f"the LoRA {name} has {len(nowhere)} tensors or layers that this model does not have, "
            f"and is put on without them ({first_few(nowhere)})"
        )
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


def fit_weight_patches(
    patches: Mapping[str, Sequence[Any]], model: Fitting, what: str = "what LoRAs and patches change"
) -> tuple[dict[str, list[Any]], list[str]]:
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
    return made, [
        f"{what} fits in part: {len(misfits)} of {total} layers do not fit the model and are left out "
        f"({_places(misfits, model)})"
    ]


def fit_scheduled(patcher: ModelPatcher) -> list[str]:
    """Have the LoRAs that come and go between steps (hooks) be left out where they do not fit; what is to be told.
    Raises ValueError where ComfyUI would end the run."""
    warnings = []
    if patcher.hook_patches:
        shapes = {name: tuple(parameter.shape) for name, parameter in patcher.model.named_parameters()}
        for hook, patches in patcher.hook_patches.items():
            known = {key: of_weight for key, of_weight in patches.items() if key in shapes}
            patcher.hook_patches[hook], more = fit_weight_patches(known, Fitting(shapes), "the scheduled LoRA")
            warnings += more
    return warnings


def _target(key: Any) -> str:
    """The weight that is patched: keys are its name, or a tuple of name, part and function."""
    return key if isinstance(key, str) else key[0]


def _places(names: Iterable[str], model: Fitting) -> str:
    return first_few(f"{name}, here {in_words(model.shape(name))}" for name in dict.fromkeys(names))


def _is_for_text(name: str) -> bool:
    return name.startswith(_TEXT)


def _without_effect(name: str, names: Sequence[str]) -> str:
    """Why a LoRA of which nothing has a place would change nothing."""
    of_model = [one for one in names if not _is_for_text(one)]
    if not of_model:
        return (
            f"the LoRA {name} is for the text encoder only, and has nothing for the diffusion model: load it with "
            f"Load LoRA on the CLIP, and leave it out here"
        )
    return (
        f"the LoRA {name} has no effect on this model: ComfyUI knows none of the names of its {len(of_model)} "
        f"tensors ({first_few(of_model)}) for it. It is for another model, or was saved by a tool whose names ComfyUI "
        f"does not know: take a version of it that is made for ComfyUI"
    )
