"""Memory that units are gathered into."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Buffer:
    """Room for the full weights of one unit at a time, which has memory only during a forward.

    `staged` is for shards that come from system memory before they are gathered.
    """

    def __init__(self, full_bytes: int, staged_bytes: int) -> None:
        self._sizes = {"full": full_bytes, "staged": staged_bytes}
        self._tensors: dict[str, Tensor] = {}
        self.holds: object = None  # the unit whose weights are, or will be, in it
        self.work: Any = None
        self.ready: torch.cuda.Event | None = None

    def allocate(self, device: torch.device) -> None:
        """Take memory. Views of it that were made before are valid again."""
        if not self._tensors:
            # Not inference tensors, whatever the mode: forwards in another mode write to them too.
            with torch.inference_mode(False):
                self._tensors = {name: torch.empty(0, dtype=torch.uint8, device=device) for name in self._sizes}
                for name, tensor in self._tensors.items():
                    tensor.resize_(self._sizes[name])
            return
        for name, tensor in self._tensors.items():
            tensor.untyped_storage().resize_(self._sizes[name])

    def free(self) -> None:
        """Give the memory back; nothing on the current stream uses it any more."""
        self.holds = None
        for tensor in self._tensors.values():
            tensor.untyped_storage().resize_(0)

    @property
    def full(self) -> Tensor:
        """The bytes (n,) for full weights."""
        return self._tensors["full"]

    @property
    def staged(self) -> Tensor:
        """The bytes (n,) for a rank's shards."""
        return self._tensors["staged"]
