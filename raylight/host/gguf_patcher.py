"""The patcher of whole GGUF models: LoRAs lie beside quantised weights, which add them when they are unpacked."""

from __future__ import annotations

from typing import Any

import comfy.float
import comfy.lora
import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from .gguf import GgmlTensors
from .patcher import Backup, RankPatcher


class GgufPatcher(RankPatcher):
    """Patches as ComfyUI-GGUF's own patcher does, but goes back to the file: its weights come from there each time
    that the model leaves the GPU."""

    ggml: GgmlTensors

    def clone(self, *args: Any, **kwargs: Any) -> GgufPatcher:
        other = super().clone(*args, **kwargs)
        other.ggml = self.ggml
        return other

    def in_file(self, weight: Tensor) -> Tensor:
        # One that is in the model is moved in place.
        return self.ggml.with_patches(weight, [])

    def patch_weight_to_device(self, key: str, device_to: torch.device | None = None, inplace_update: bool = False,
                               **_: Any) -> None:
        """Put the patches on a weight beside it where it is quantised, and into it, in float32, where it is not."""
        if key not in self.patches:
            return
        weight, patches = comfy.utils.get_attr(self.model, key), self.patches[key]
        device = weight.device if device_to is None else device_to
        self.backup.setdefault(key, Backup(self.in_file(self.mapped[key]), False))
        if self.ggml.is_quantised(weight):
            patched = self.ggml.with_patches(weight.to(device), [(patches, key)])
        else:
            # Not from the weight in the model: one that comes to the GPU late has its patches already.
            start = comfy.model_management.cast_to_device(self.mapped[key], device, torch.float32, copy=True)
            patched = comfy.lora.calculate_weight(patches, start, key)
            patched = comfy.float.stochastic_rounding(patched, weight.dtype)
        comfy.utils.set_attr_param(self.model, key, patched)

    def load(self, *args: Any, force_patch_weights: bool = False, **kwargs: Any) -> None:
        # What ComfyUI would add to weights that it casts on use is not looked at by the pack's layers.
        super().load(*args, force_patch_weights=True, **kwargs)

    def partially_unload(self, device_to: torch.device, memory_to_free: int = 0,
                         force_patch_weights: bool = False) -> int:
        return super().partially_unload(device_to, memory_to_free, force_patch_weights=True)
