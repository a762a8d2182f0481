"""What nodes put on a model's patcher, taken from the one in ComfyUI's process and put on a worker's."""

from __future__ import annotations

import uuid
from typing import Any

import comfy.model_patcher

from .recipe import WHOLE

# Attributes of ComfyUI's `ModelPatcher` that a node can change, apart from `patches`, which go a way of their own.
_ALL = ("object_patches", "weight_wrapper_patches", "force_cast_weights", "injections", "attachments",
        "additional_models", "callbacks", "model_options", "hook_patches", "hook_mode")
# Of these, what concerns the diffusion model itself when everything around it stays in ComfyUI.
_INNER = ("weight_wrapper_patches", "force_cast_weights", "injections")
_INSIDE = "diffusion_model."
# What ComfyUI puts into the weights' layers when it loads them, and at no other time.
_LOADED = ("force_cast_weights", "weight_wrapper_patches")
_VERSION = "patches_uuid"

Dress = dict[str, Any]


def of_run(patcher: comfy.model_patcher.ModelPatcher) -> Dress:
    """What a worker needs to do all that the model does."""
    return {name: getattr(patcher, name) for name in (*_ALL, _VERSION) if hasattr(patcher, name)}


def of_forward(patcher: comfy.model_patcher.ModelPatcher) -> Dress:
    """What a worker needs to do the diffusion model's part."""
    found = {name: getattr(patcher, name) for name in (*_INNER, _VERSION) if hasattr(patcher, name)}
    # One of the forward is put around the call here.
    inside = {name: value for name, value in patcher.object_patches.items()
              if name.startswith(_INSIDE) and name != f"{_INSIDE}forward"}
    return found | {"object_patches": inside}


def put_on(patcher: comfy.model_patcher.ModelPatcher, dress: Dress, sharding: str) -> None:
    """Put it on a worker's patcher. Raises ValueError for what split weights cannot have."""
    if sharding != WHOLE:
        for name, what in (("weight_wrapper_patches", "functions around weights"),
                           ("force_cast_weights", "a compute dtype of its own"), ("hook_patches", "scheduled LoRAs")):
            if dress.get(name):
                raise ValueError(f"the model has {what}, which split weights cannot have: switch FSDP off, or remove "
                                 f"the node that sets this")
    for name, value in dress.items():
        if name != _VERSION:
            setattr(patcher, name, value)
    if any(dress.get(name) for name in _LOADED):
        # ComfyUI loads anew for another version. A patcher without these keeps its own, and so its loaded weights.
        patcher.patches_uuid = uuid.uuid5(patcher.patches_uuid, str(dress[_VERSION]))
