"""Signs of progress from within a forward, whatever the model's plan and whoever computes its attention."""

from __future__ import annotations

import torch
from torch import nn

from raylight.parallel import heartbeat
from raylight.sharding.fsdp import units

_EACH = 4  # blocks count as one part of a forward


class BlockSigns:
    """Lets every few blocks of a model count as progress: when they are launched, and when the GPU has come as far."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device = device
        blocks = list(units(model).values())[::_EACH]
        self._handles = [block.register_forward_pre_hook(self._sign) for block in blocks]

    def _sign(self, *_: object) -> None:
        heartbeat.launched(self._device)

    def remove(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
