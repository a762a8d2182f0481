"""Weights that nodes' code has written to in ComfyUI's process, where they are mapped from their file."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping

import torch
from comfy.model_base import BaseModel
from torch import Tensor

from raylight.cluster.serialization import as_bytes
from raylight.host import loading
from raylight.host.log_messages import gb
from raylight.host.recipe import ModelRecipe

from . import weightless
from .beside_model import INNER
from .mappings import are_written

LARGEST = 2 * 2**30
"""Bytes of changed weights that are sent with a run."""
_REMEDY = (
    "load the model with Load Diffusion Model, and put Parallelize Model (Ray) after the node that changes its weights"
)


# By model, as of the last `look`: the weights, and a digest of their content.
_found: weakref.WeakKeyDictionary[BaseModel, tuple[dict[str, Tensor], str]] = weakref.WeakKeyDictionary()


def of(base: BaseModel) -> tuple[dict[str, Tensor], str]:
    """Return what `look` found last, by the names of ComfyUI's patches, and a digest of it, "" if it found nothing."""
    return _found.get(base, ({}, ""))


def look(base: BaseModel, recipe: ModelRecipe) -> None:
    """Find the weights of a model of `weightless.build` that differ from the file, for `of`. Call it when a run begins.

    Raises ValueError for what cannot be sent: a weight of another shape, a quantised one, or more than LARGEST bytes.
    """
    baseline = weightless.baseline_of(base)
    names = baseline.changed_weights(base)
    now = dict(base.diffusion_model.named_parameters())
    if not names and are_written(weight for weight in now.values() if _is_plain(weight)):
        with torch.inference_mode(False), torch.no_grad():
            file = dict(loading.map_file(recipe, log_unused=False).model.diffusion_model.named_parameters())
        names = [name for name, weight in now.items() if _is_plain(weight) and not torch.equal(weight, file[name])]
    for name in names:
        if name not in now or not _is_plain(now[name]) or now[name].shape != baseline.shape(name):
            raise ValueError(
                f"a node has changed the weight {name} of {recipe.name} in ComfyUI's process, which "
                f"cannot be sent to the workers: {_REMEDY}"
            )
    size = sum(now[name].nbytes for name in names)
    if size > LARGEST:
        raise ValueError(
            f"a node has changed {len(names)} weights of {recipe.name} in ComfyUI's process, {gb(size)}, which is too "
            f"much to send with each run: {_REMEDY}"
        )
    weights = {f"{INNER}.{name}": now[name].detach() for name in names}
    _found[base] = weights, _digest(weights)


def _digest(weights: Mapping[str, Tensor]) -> str:
    if not weights:
        return ""
    # Of their content, as a write by `.data` changes neither a weight's address nor its version.
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in weights.items():
        digest.update(name.encode())
        digest.update(as_bytes(weight).data)
    return digest.hexdigest()


def _is_plain(weight: Tensor) -> bool:
    return type(weight) in (Tensor, torch.nn.Parameter) and weight.dtype.is_floating_point and not weight.is_meta
