"""What a forward takes of a GPU, and what is left there."""

from __future__ import annotations

from typing import Protocol

import torch

from . import cuda_graphs


class SpareMemory(Protocol):
    """The memory of a device, for what can stay there between forwards."""

    def begin(self) -> None:
        """Begin to measure a forward."""
        ...

    def taken(self) -> int:
        """Return the most bytes that were in use at once since `begin`, beside those in use then."""
        ...

    def left(self) -> int:
        """Return how many bytes this process could take beside those in use now."""
        ...

    def graphs(self) -> int:
        """Return how many bytes CUDA graphs keep to themselves."""
        ...

    def tidy(self) -> None:
        """Give back what is not in use, so that what is taken next does not lie between what a forward takes."""
        ...


class GpuMemory:
    """The memory of a GPU, as PyTorch's allocator has it. Nothing here waits for the GPU, but `tidy`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0

    def begin(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)

    def taken(self) -> int:
        return max(0, torch.cuda.max_memory_allocated(self._device) - self._before)

    def left(self) -> int:
        free, _ = torch.cuda.mem_get_info(self._device)
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        # What graphs keep to themselves is for their replays.
        return free + max(0, unused - self.graphs())

    def graphs(self) -> int:
        return cuda_graphs.held_bytes(self._device)

    def tidy(self) -> None:
        torch.cuda.empty_cache()


def spare_memory(device: torch.device) -> SpareMemory | None:
    """Return the memory of a device; None for a CPU, where nothing is gained by keeping more in it."""
    return GpuMemory(device) if device.type == "cuda" else None
