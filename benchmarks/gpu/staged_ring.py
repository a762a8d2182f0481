"""A ring whose keys and values travel by way of the CPU: for ranks that share one GPU, in tests only.

NCCL refuses two ranks on one GPU, and gloo has no point-to-point for CUDA tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from raylight.parallel.ring import HybridAttention, RingAttention


class _Arrival:
    """Waits for what was received on the CPU, and copies it to the GPU."""

    def __init__(self, requests: Sequence[dist.Work], staged: Tensor, arriving: Tensor) -> None:
        self._requests, self._staged, self._arriving = requests, staged, arriving

    def wait(self) -> None:
        for request in self._requests:
            request.wait()
        self._arriving.copy_(self._staged)


class StagedThroughCpuRing(RingAttention):
    """Raylight's ring but for its transport."""

    def _pass_on(self, block: Tensor, lengths: Sequence[int], source: int) -> tuple[Tensor, list[Any]]:
        on_cpu = block.cpu().contiguous()
        staged, requests = super()._pass_on(on_cpu, lengths, source)
        arriving = staged.new_empty(staged.shape, device=block.device)
        # What is being sent must live until it is sent.
        self._sending = on_cpu
        return arriving, [_Arrival(requests, staged, arriving)]


class StagedThroughCpuHybrid(HybridAttention):
    """Raylight's Ulysses x ring with that ring."""

    def __init__(self, ulysses: dist.ProcessGroup, ring: dist.ProcessGroup) -> None:
        super().__init__(ulysses, ring)
        self._ring = StagedThroughCpuRing(ring)
