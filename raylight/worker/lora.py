"""LoRA files and other patches of weights: which of them fit the model.

ComfyUI finds out when it patches a weight: it leaves out most patches that do not fit, with an error in its log for
each, and some end the run. Here its own calculation is tried before, on tensors without memory. So the user gets one
warning, and a run that would end is refused before it begins.
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
from raylight.host.model_files import here
from raylight.host.recipe import LoraRecipe

_META = torch.device("meta")
# ComfyUI's patches that are no adapters, of which a LoRA file can have these.
_PLAIN = ("diff", "set")
# How trainers name what is for a text encoder.
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

Region = tuple[int, int, int] | None
"""Of a weight: dimension, start, length."""
Patches = dict[Any, Any]
"""ComfyUI's patches, by the key of a weight or (key, region[, function])."""


class WeightShapes:
    """The shapes of one model's weights. Patches are tried in their order, as some change a weight's shape."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = dict(shapes)
        self._tried: dict[Any, tuple[bool, tuple[int, ...]]] = {}  # most layers of a model are alike

    def __contains__(self, key: str) -> bool:
        return key in self._shapes

    def text(self, key: str) -> str:
        """Return a weight's shape after the patches so far, for a message."""
        return _shape_text(self._shapes[key])

    def fits(self, key: str, value: Any, region: Region = None, function: Any = None) -> bool:
        """Return whether ComfyUI applies a patch to the weight `key`, or to a region of it. True if only the real
        weight can decide.

        Raises ValueError: when ComfyUI would end the run.
        """
        patch = _weightless(value)
        if patch is None:
            return True
        case = (_outline(patch), self._shapes[key], region, function)
        if case not in self._tried:
            self._tried[case] = _try(patch, key, *case[1:])
        fits, self._shapes[key] = self._tried[case]
        return fits

    def zero_patch(self, key: str, region: Region = None) -> Any:
        """Return a patch that changes nothing. In place of a misfit, as ComfyUI rounds a quantised weight again if it
        has any patch.
        """
        shape = list(self._shapes[key])
        if region is not None:
            shape[region[0]] = region[2]
        return "diff", (torch.zeros(()).expand(shape),)

    def fit(self, key: str, value: Any, region: Region, function: Any, source: str) -> tuple[Any, bool]:
        """Return the patch if it fits, else a zero patch, and whether it fits.

        Raises ValueError: when ComfyUI would end the run; the message names the `source` of the patch.
        """
        try:
            fits = self.fits(key, value, region, function)
        except ValueError as error:
            raise ValueError(f"{source} is damaged or for another model: {error}") from error
        return value if fits else self.zero_patch(key, region), fits


def _try(patch: Any, key: str, shape: tuple[int, ...], region: Region, function: Any) -> tuple[bool, tuple[int, ...]]:
    """Return whether ComfyUI applies a patch of `meta` tensors to a weight of this shape, and the shape after it."""
    with torch.inference_mode(False), torch.no_grad(), captured_log("") as lines:
        before = torch.empty(shape, device=_META)
        version = before._version
        try:
            after = comfy.lora.calculate_weight([(1.0, patch, 1.0, region, function)], before, key)
        except Exception as error:  # of ComfyUI's adapters, which raise many kinds
            if _is_about_meta(str(error)):
                return True, shape
            raise ValueError(
                f"what it has for {key} cannot be applied to a weight of {_shape_text(shape)}: {error}"
            ) from error
    # A tensor counts changes in place.
    fits = after is not before or after._version > version or any(map(_is_about_meta, lines))
    return fits, tuple(after.shape)


def _shape_text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one number"


def _weightless(value: Any) -> Any:
    """Return the same patch with tensors on `meta`; None for kinds that cannot be tried so."""
    if type(value) in comfy.weight_adapter.adapters:
        weights = [_on_meta(weight) for weight in value.weights]
        if value.name in ("oft", "boft") and isinstance(weights[2], (int, float)):
            weights[2] = 0.0  # the limit of a rotation, with which numbers are compared
        return type(value)(value.loaded_keys, tuple(weights))
    if isinstance(value, tuple) and len(value) == 2 and value[0] in _PLAIN:
        return value[0], tuple(_on_meta(one) for one in value[1])
    return None


def _outline(patch: Any) -> Any:
    """Return what of a patch on `meta` decides whether it fits."""
    kind, values = (patch[0], patch[1]) if isinstance(patch, tuple) else (type(patch), patch.weights)
    return kind, tuple(
        (tuple(one.shape), one.dtype) if isinstance(one, Tensor) else type(one) if isinstance(one, float) else repr(one)
        for one in values
    )


def _on_meta(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype, device=_META) if isinstance(value, Tensor) else value


def _is_about_meta(text: str) -> bool:
    """Return whether an error is due to the trial on `meta`, and not to the patch."""
    return "meta tensor" in text or "'Meta'" in text or "Meta backend" in text


@dataclass(slots=True)
class FittedLora:
    """The patches of a LoRA, as `ModelPatcher.add_patches` takes them, and warnings for the user."""

    patches: Patches
    warnings: list[str]


def read_lora(recipe: LoraRecipe, keys: Mapping[str, Any], shapes: WeightShapes) -> FittedLora:
    """Read a LoRA file for a model with these weights; `keys` maps names in LoRA files to them.

    Raises ValueError: when the file cannot be read, has nothing that fits the model, or would end the run in ComfyUI;
    the message names the file.
    """
    if not os.path.isfile(here(recipe.path)):
        raise ValueError(f"the LoRA file {recipe.path} is not there on the machine of this worker")
    try:
        tensors = tensor_file.read(here(recipe.path))
    except Exception as error:  # of safetensors, pickle, zip, the system: whatever the file is instead
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{recipe.name} cannot be read as a LoRA: {tensor_file.describe_error(error)}") from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{recipe.name} cannot be read as a LoRA: it holds no tensors by name")
    return fit_lora(recipe.name, tensors, keys, shapes)


def fit_lora(name: str, tensors: dict[str, Tensor], keys: Mapping[str, Any], shapes: WeightShapes) -> FittedLora:
    """`read_lora` for the tensors of a LoRA."""
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
    found = {key: value for key, value in patches.items() if _target(key) in shapes}
    if not found:
        raise ValueError(_without_effect(name, names))
    misfits = []
    for key, value in found.items():
        region, function = (None, None) if isinstance(key, str) else (*key[1:], None, None)[:2]
        found[key], fits = shapes.fit(_target(key), value, region, function, f"the LoRA {name}")
        if not fits:
            misfits.append(_target(key))
    if len(misfits) == len(found):
        raise ValueError(
            f"the LoRA {name} is for another model, or another size of this one: none of its {len(found)} "
            f"layers fits ({_with_shapes(misfits, shapes)})"
        )
    warnings = []
    if misfits:
        warnings.append(
            f"the LoRA {name} fits in part: {len(misfits)} of its {len(found)} layers do not fit "
            f"the model and are left out ({_with_shapes(misfits, shapes)})"
        )
    nowhere = [line.removeprefix(_NOT_LOADED) for line in lines]
    nowhere += [_target(key) for key in patches if key not in found]
    nowhere = [one for one in nowhere if not one.startswith(_TEXT)]
    if nowhere:
        warnings.append(
            f"the LoRA {name} has {len(nowhere)} tensors or layers that this model does not have, "
            f"and is applied without them ({first_few(nowhere)})"
        )
    return FittedLora(found, warnings)


def fit_weight_patches(
    patches: Mapping[str, Sequence[Any]], shapes: WeightShapes, what: str = "what LoRAs and patches change"
) -> tuple[dict[str, list[Any]], list[str]]:
    """Return patches in the form of ComfyUI's patcher, by key of the weight, with zero patches in place of those that
    do not fit, and warnings about `what` for the user.

    Raises ValueError: when ComfyUI would end the run.
    """
    fitted: dict[str, list[Any]] = {key: [] for key in patches}
    misfits = []
    for key, of_weight in patches.items():
        for strength, value, strength_model, region, function in of_weight:
            value, fits = shapes.fit(key, value, region, function, "a LoRA or patch on the model")
            fitted[key].append((strength, value, strength_model, region, function))
            if not fits:
                misfits.append(key)
    if not misfits:
        return fitted, []
    total = sum(map(len, patches.values()))
    return fitted, [
        f"{what} fits in part: {len(misfits)} of {total} layers do not fit the model and are left out "
        f"({_with_shapes(misfits, shapes)})"
    ]


def fit_scheduled(patcher: ModelPatcher) -> list[str]:
    """Put zero patches in place of those of scheduled LoRAs (hooks) that do not fit; return warnings for the user.

    Raises ValueError: when ComfyUI would end the run.
    """
    warnings = []
    if patcher.hook_patches:
        shapes = {name: tuple(parameter.shape) for name, parameter in patcher.model.named_parameters()}
        for hook, patches in patcher.hook_patches.items():
            known = {key: of_weight for key, of_weight in patches.items() if key in shapes}
            patcher.hook_patches[hook], more = fit_weight_patches(known, WeightShapes(shapes), "the scheduled LoRA")
            warnings += more
    return warnings


def _target(key: Any) -> str:
    return key if isinstance(key, str) else key[0]


def _with_shapes(names: Iterable[str], shapes: WeightShapes) -> str:
    return first_few(f"{name}, here {shapes.text(name)}" for name in dict.fromkeys(names))


def _without_effect(name: str, names: Sequence[str]) -> str:
    """Return why a LoRA of which no tensor has a place in the model changes nothing."""
    of_model = [one for one in names if not one.startswith(_TEXT)]
    if not of_model:
        return (
            f"the LoRA {name} is for the text encoder only, and has nothing for the diffusion model: load it with "
            f"Load LoRA on the CLIP, and leave it out here"
        )
    return (
        f"the LoRA {name} has no effect on this model: ComfyUI knows none of the names of its {len(of_model)} "
        f"tensors ({first_few(of_model)}) for it. It is for another model, or was saved by a tool whose names ComfyUI "
        f"does not know: use a version of it that is made for ComfyUI"
    )
