"""ComfyUI's patcher, for ranks that must do alike and weights that stay in their file."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Mapping
from typing import Any

import comfy.model_patcher
import torch
from torch import Tensor

from raylight.parallel.process_group import smallest
from raylight.sharding.joined import JoinedRows

from .mapped import MappedModel, set_parameter

# As ComfyUI names and makes the entries of `ModelPatcher.backup`.
_Backup = namedtuple("Dimension", ["weight", "inplace_update"])


class RankPatcher(comfy.model_patcher.ModelPatcher):
    """A patcher that makes the same decisions on every rank, and keeps no copy of weights that a file has.

    What is in the file is ComfyUI's backup of every weight: when the model leaves the GPU, or other patches are
    wanted, weights are taken from there, where all ranks share them, and not from a copy in each rank's memory.
    """

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.mapped: Mapping[str, Tensor] = {}

    def clone(self, *args: Any, **kwargs: Any) -> RankPatcher:
        other = super().clone(*args, **kwargs)
        other.mapped = self.mapped
        return other

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        super().unpatch_model(device_to, unpatch_weights)
        self.back_up()

    def back_up(self) -> None:
        """Let the weights in the file be what ComfyUI goes back to."""
        for key, weight in self.mapped.items():
            self.backup.setdefault(key, _Backup(weight, False))

    def get_free_memory(self, device: torch.device) -> int:
        """Free bytes on the fullest rank. Collective.

        ComfyUI batches conditionings by what is free; ranks that batched differently would meet in
        collectives of different shapes.
        """
        return smallest(int(super().get_free_memory(device)))


def whole(mapped: MappedModel, offload_device: torch.device) -> tuple[RankPatcher, int]:
    """A patcher of all the weights of a mapped model. Those that are to have another dtype than in the file become a
    copy of this rank's own, of so many bytes, and so do those that the file has in several tensors."""
    diffusion_model = mapped.model.diffusion_model
    own_bytes = 0
    for name, parameter in list(diffusion_model.named_parameters()):
        dtype = mapped.dtypes.get(name, parameter.dtype)
        if isinstance(parameter, JoinedRows) or parameter.dtype != dtype:
            own = parameter.detach()[...].to(dtype)
            own_bytes += own.nbytes
            set_parameter(diffusion_model, name, own)
    patcher = RankPatcher(mapped.model, mapped.load_device, offload_device)
    patcher.mapped = {f"diffusion_model.{name}": parameter.detach()
                      for name, parameter in diffusion_model.named_parameters()}
    patcher.back_up()
    return patcher, own_bytes
