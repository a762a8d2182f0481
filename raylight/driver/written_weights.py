"""Weights that code of nodes has written to in ComfyUI's process, though they are only mapped there from their file."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping

import torch
from comfy.model_base import BaseModel
from torch import Tensor

from raylight.cluster.serialization import as_bytes
from raylight.host import loading
from raylight.host.recipe import ModelRecipe

from . import weightless
from .mappings import are_written

PREFIX = "diffusion_model."
LARGEST = 2 * 2**30
"""Bytes of changed weights that are sent with a run; more is a model of its own."""
_REMEDY = (
    "take the model from Load Diffusion Model, and put Parallelize Model (Ray) behind the node that changes its weights"
)


# As they were when the last run began, and a text of what they were.
_found: weakref.WeakKeyDictionary[BaseModel, tuple[dict[str, Tensor], str]] = weakref.WeakKeyDictionary()


def of(base: BaseModel) -> tuple[dict[str, Tensor], str]:
    """What `look` found last, and a text that is another for other weights or content; "" where there are none."""
    return _found.get(base, ({}, ""))


def look(base: BaseModel, recipe: ModelRecipe) -> None:
    """Look which weights of a model of `weightless.build` are not those of the file any more, when a run begins.

    `of` has them by their names in ComfyUI's patches. Raises ValueError for what cannot be sent: a weight of another
    shape, a quantised one, or too much of them.
    """
    names = weightless.baseline_of(base).changed_weights(base)
    now = dict(base.diffusion_model.named_parameters())
    if not names and are_written(weight for weight in now.values() if _is_plain(weight)):
        with torch.inference_mode(False), torch.no_grad():
            file = dict(loading.map_file(recipe, log_unused=False).model.diffusion_model.named_parameters())
        names = [name for name, weight in now.items() if _is_plain(weight) and not torch.equal(weight, file[name])]
    for name in names:
        if name not in now or not _is_plain(now[name]) or now[name].shape != weightless.baseline_of(base).shape(name):
            raise ValueError(
                f"a node has changed the weight {name} of {recipe.name} in ComfyUI's process, which "
                f"cannot be sent to the workers: {_REMEDY}"
            )
    size = sum(now[name].nbytes for name in names)
    if size > LARGEST:
        raise ValueError(
            f"a node has changed {len(names)} weights of {recipe.name} in ComfyUI's process, "
            f"{size / 1e9:.1f} GB, which is too much to be sent with each run: {_REMEDY}"
        )
    weights = {PREFIX + name: now[name].detach() for name in names}
    _found[base] = weights, _digest(weights)


def _digest(weights: Mapping[str, Tensor]) -> str:
    """Of their content: what is written by `.data` changes neither a weight's place nor its version."""
    if not weights:
        return ""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in weights.items():
        digest.update(name.encode())
        digest.update(as_bytes(weight))
    return digest.hexdigest()


def _is_plain(weight: Tensor) -> bool:
    return type(weight) in (Tensor, torch.nn.Parameter) and weight.dtype.is_floating_point and not weight.is_meta
