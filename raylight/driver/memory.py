"""GPU memory that ComfyUI and the workers share.

ComfyUI unloads models when the user asks for it ("Unload Models", "Free model and node cache", its /free route), and
when another model needs the memory of a GPU. It then calls the patchers that it lists as loaded; one of these, without
weights, represents the models on the workers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from torch import nn


class _WorkersModels(comfy.model_patcher.ModelPatcher):
    def __init__(self, free: Callable[[], None]) -> None:
        device = comfy.model_management.get_torch_device()
        super().__init__(nn.Module(), device, torch.device("cpu"), size=1)
        self._free = free

    def detach(self, unpatch_all: bool = True) -> nn.Module:
        model = super().detach(unpatch_all)
        self._free()
        return model


_registered: _WorkersModels | None = None


def register(free: Callable[[], None]) -> None:
    """Have ComfyUI call `free` when it unloads models. Does nothing if that is so already."""
    global _registered
    if _registered is None or not _loaded(_registered):
        _registered = _WorkersModels(free)
        comfy.model_management.load_models_gpu([_registered])


def make_room(missing: int) -> None:
    """Ask ComfyUI to unload its models until `missing` more bytes are free. Does nothing if `missing` <= 0, so that the
    text encoder and the VAE stay loaded while all fits.
    """
    if missing <= 0:
        return
    keep = [] if _registered is None else _loaded(_registered)
    device = comfy.model_management.get_torch_device()
    free: Any = comfy.model_management.get_free_memory(device)
    comfy.model_management.free_memory(free + missing, device, keep)
    comfy.model_management.soft_empty_cache()


def _loaded(patcher: comfy.model_patcher.ModelPatcher) -> list[comfy.model_management.LoadedModel]:
    return [one for one in comfy.model_management.current_loaded_models if one.model is patcher]
