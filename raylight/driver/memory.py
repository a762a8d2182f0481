"""What ComfyUI's memory manager sees of models on workers: a model without weights, told when all are to go.

ComfyUI unloads models when a person asks it to ("Unload Models", "Free model and node cache", its /free route), and
when another model needs the memory of a GPU. It does so by calling the patchers that it knows as loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import comfy.model_management
import comfy.model_patcher
import torch
from torch import nn

logger = logging.getLogger(__name__)


class _Presence(comfy.model_patcher.ModelPatcher):
    def __init__(self, free: Callable[[], None]) -> None:
        device = comfy.model_management.get_torch_device()
        super().__init__(nn.Module(), device, torch.device("cpu"), size=1)
        self._free = free

    def detach(self, unpatch_all: bool = True) -> nn.Module:
        model = super().detach(unpatch_all)
        self._free()
        return model


_presence: _Presence | None = None


def register(free: Callable[[], None]) -> None:
    """Have ComfyUI call `free` when it unloads models, once."""
    global _presence
    if _presence is None or not _loaded(_presence):
        _presence = _Presence(free)
        comfy.model_management.load_models_gpu([_presence])


def make_room(missing: int) -> None:
    """Have ComfyUI unload models of its own, those that it would unload first, until its GPU has so many bytes more;
    none where nothing is missing, so that the text encoder and the VAE stay as long as all fit."""
    if missing <= 0:
        return
    keep = [] if _presence is None else _loaded(_presence)
    device = comfy.model_management.get_torch_device()
    comfy.model_management.free_memory(comfy.model_management.get_free_memory(device) + missing, device, keep)
    comfy.model_management.soft_empty_cache()


def _loaded(patcher: comfy.model_patcher.ModelPatcher) -> list[comfy.model_management.LoadedModel]:
    return [one for one in comfy.model_management.current_loaded_models if one.model is patcher]
