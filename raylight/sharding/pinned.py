"""System memory that a GPU copies from at full speed, as large as what is kept in it.

PyTorch's own pinned memory comes in blocks of powers of two, up to twice of what is asked for, and stays with the
process when it is freed.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .alignment import aligned

logger = logging.getLogger(__name__)

_ALIGNMENT = 256


class _PinnedMemory(mmap.mmap):
    """Memory of this process that CUDA knows; freed with the last tensor in it."""

    address = 0
    _registered = False

    def register(self, nbytes: int) -> None:
        """Have CUDA pin it."""
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self))
        error = _cudart().cudaHostRegister(self.address, nbytes, 0)
        self._registered = int(error) == 0
        if not self._registered:
            logger.warning(
                "%.2f GB of system memory could not be pinned (CUDA error %d): copies of weights to the GPU are slower",
                nbytes / 1e9,
                int(error),
            )

    def __del__(self) -> None:
        if self._registered:
            try:
                torch.cuda.synchronize()  # copies from here that have begun
                _cudart().cudaHostUnregister(self.address)
            except Exception:  # CUDA has ended before, or has failed: the process ends, and the memory with it
                logger.debug("pinned memory was not unregistered", exc_info=True)


def _cudart() -> Any:
    return torch.cuda.cudart()


class PinnedBuffer:
    """Room for tensors of `sizes` bytes, in one piece of pinned memory."""

    def __init__(self, sizes: Sequence[int]) -> None:
        nbytes = max(1, sum(aligned(size, _ALIGNMENT) for size in sizes))
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
        self._memory = _PinnedMemory(-1, nbytes, **private)
        if hasattr(mmap, "MADV_HUGEPAGE"):  # it is pinned in a fraction of the time
            try:
                self._memory.madvise(mmap.MADV_HUGEPAGE)
            except OSError:  # a system without large pages
                logger.debug("no large pages for pinned memory", exc_info=True)
        self._memory.register(nbytes)
        self._used = 0

    def take(self, like: Tensor) -> Tensor:
        """Return room for a contiguous tensor (shape, dtype of `like`) on the CPU. Its values are undefined.

        Raises ValueError: when there is no room left.
        """
        if like.nbytes == 0:
            return torch.empty(like.shape, dtype=like.dtype)
        if self._used + like.nbytes > len(self._memory):
            raise ValueError(f"{like.nbytes} bytes do not fit into the pinned memory that is left")
        raw = torch.frombuffer(self._memory, dtype=torch.uint8, count=like.nbytes, offset=self._used)
        self._used += aligned(like.nbytes, _ALIGNMENT)
        return raw.view(like.dtype).view(like.shape)
