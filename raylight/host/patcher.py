"""ComfyUI's patcher, for ranks that must do alike."""

from __future__ import annotations

import comfy.model_patcher
import torch

from raylight.parallel.process_group import smallest


class RankPatcher(comfy.model_patcher.ModelPatcher):
    """A patcher that makes the same decisions on every rank."""

    def get_free_memory(self, device: torch.device) -> int:
        """Free bytes on the fullest rank. Collective.

        ComfyUI batches conditionings by what is free; ranks that batched differently would meet in
        collectives of different shapes.
        """
        return smallest(int(super().get_free_memory(device)))
