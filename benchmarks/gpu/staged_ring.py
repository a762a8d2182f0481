"""A ring whose keys and values are sent through the CPU: for ranks that share one GPU, in tests only.

NCCL refuses two ranks on one GPU, and gloo has no point-to-point for CUDA tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from raylight.parallel.ring import HybridAttention, RingAttention


class _Arrival:
    """Waits for a block that is received on the CPU, and copies it to the GPU."""

    def __init__(self, requests: Sequence[dist.Work], staged: Tensor, next_block: Tensor) -> None:
        self._requests, self._staged, self._next_block = requests, staged, next_block

    def wait(self) -> None:
        for request in self._requests:
            request.wait()
        self._next_block.copy_(self._staged)


class StagedThroughCpuRing(RingAttention):
    """Raylight's ring but for its transport."""

    def _pass_on(self, block: Tensor, lengths: Sequence[int], source: int) -> tuple[Tensor, list[Any]]:
        on_cpu = block.cpu().contiguous()
        staged, requests = super()._pass_on(on_cpu, lengths, source)
        next_block = staged.new_empty(staged.shape, device=block.device)
        self._sending = on_cpu  # it must live until it is sent
        return next_block, [_Arrival(requests, staged, next_block)]


class StagedThroughCpuHybrid(HybridAttention):
    """Raylight's Ulysses x ring with that ring."""

    def __init__(self, ulysses: dist.ProcessGroup, ring: dist.ProcessGroup) -> None:
        super().__init__(ulysses, ring)
        self._ring = StagedThroughCpuRing(ring)
