"""ComfyUI's patcher, for ranks that must do alike and weights that stay in their file."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Mapping
from typing import Any

import comfy.model_patcher
import torch
from torch import Tensor

from raylight.parallel.process_group import smallest

from .mode import in_own_mode
from .recipe import WHOLE

# As ComfyUI names and makes the entries of `ModelPatcher.backup`.
Backup = namedtuple("Dimension", ["weight", "inplace_update"])


class RankPatcher(comfy.model_patcher.ModelPatcher):
    """A patcher that makes the same decisions on every rank, and keeps no copy of weights that a file has.

    What is in the file is ComfyUI's backup of every weight: when the model leaves the GPU, or other patches are
    wanted, weights are taken from there, where all ranks share them, and not from a copy in each rank's memory.
    """

    sharding = WHOLE

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.mapped: Mapping[str, Tensor] = {}

    def clone(self, *args: Any, **kwargs: Any) -> RankPatcher:
        other = super().clone(*args, **kwargs)
        other.mapped = self.mapped
        return other

    # Whatever of it ComfyUI calls to have weights moved or patched.
    partially_load = in_own_mode(comfy.model_patcher.ModelPatcher.partially_load)
    partially_unload = in_own_mode(comfy.model_patcher.ModelPatcher.partially_unload)
    patch_model = in_own_mode(comfy.model_patcher.ModelPatcher.patch_model)
    load = in_own_mode(comfy.model_patcher.ModelPatcher.load)
    detach = in_own_mode(comfy.model_patcher.ModelPatcher.detach)

    @in_own_mode
    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        super().unpatch_model(device_to, unpatch_weights)
        self.back_up()

    def back_up(self) -> None:
        """Let the weights in the file be what ComfyUI goes back to."""
        for key, weight in self.mapped.items():
            self.backup.setdefault(key, Backup(self.in_file(weight), False))

    def in_file(self, weight: Tensor) -> Tensor:
        """A weight of the file as the model can have it in its place."""
        return weight

    def get_free_memory(self, device: torch.device) -> int:
        """Free bytes on the fullest rank. Collective.

        ComfyUI batches conditionings by what is free; ranks that batched differently would meet in
        collectives of different shapes.
        """
        return smallest(int(super().get_free_memory(device)))
