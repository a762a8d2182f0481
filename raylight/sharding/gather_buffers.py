"""Memory that units are gathered into."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Buffer:
    """Bytes (`size`,) on a device that have memory only between `allocate` and `free`.

    As what weights are gathered into, it has those of one unit at a time, `holds`, from when `work` is done or `ready`
    is reached.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._tensor: Tensor | None = None
        self.holds: object = None
        self.work: Any = None
        self.ready: torch.cuda.Event | None = None

    def allocate(self, device: torch.device) -> None:
        """Take memory. Views of it that were made before are valid again."""
        if self._tensor is None:
            # Not an inference tensor, whatever the mode: forwards in another mode write to it too.
            with torch.inference_mode(False):
                self._tensor = torch.empty(self._size, dtype=torch.uint8, device=device)
        else:
            self._tensor.untyped_storage().resize_(self._size)

    def free(self) -> None:
        """Give the memory back; nothing on the current stream uses it any more."""
        self.holds = None
        if self._tensor is not None:
            self._tensor.untyped_storage().resize_(0)

    @property
    def bytes(self) -> Tensor:
        """The bytes, of a buffer that has been allocated."""
        assert self._tensor is not None, "a buffer is used before it has memory"
        return self._tensor
