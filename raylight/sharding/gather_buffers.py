"""Memory that units are gathered into, and the collective that does it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions

from raylight.parallel.heartbeat import beat

if TYPE_CHECKING:
    from .unit_weights import UnitWeights


class Buffer:
    """Room for the full weights of one unit at a time, which has memory only during a forward.

    `staged` is for shards that come from system memory before they are gathered.
    """

    def __init__(self, full_bytes: int, staged_bytes: int) -> None:
        self._sizes = {"full": full_bytes, "staged": staged_bytes}
        self._tensors: dict[str, Tensor] = {}
        self.holds: UnitWeights | None = None
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


class Gatherer:
    """All-gathers the weights of units into buffers, on a GPU on a stream of its own."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.device = device
        self._group, self._degree = group, dist.get_world_size(group)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # PyTorch 2.14 gave it another name.
        self._all_gather = getattr(group, "all_gather_single_coalesced", None) or group.allgather_into_tensor_coalesced
        self._options = AllgatherOptions()
        self._options.asyncOp = self._stream is None

    def start(self, weights: UnitWeights, buffer: Buffer) -> None:
        """Start to gather the weights of a unit into a buffer that is not used any more. Collective."""
        self._finish(buffer)
        buffer.holds = weights
        if not weights.needs_gather:
            return
        if self._stream is None:
            buffer.work = self._gather(weights, buffer)
            return
        # The unit that the buffer had is done where the current stream is now.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            if (work := self._gather(weights, buffer)) is not None:
                work.wait()  # of this stream, not of the host
            buffer.ready = buffer.ready or torch.cuda.Event()
            buffer.ready.record(self._stream)

    def wait(self, buffer: Buffer) -> None:
        """Let the current stream wait until the weights are in the buffer."""
        self._finish(buffer)
        if buffer.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(buffer.ready)

    def join(self, buffers: list[Buffer]) -> None:
        """Let the current stream wait for all that was started, into these buffers."""
        for buffer in buffers:
            self._finish(buffer)
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def _finish(self, buffer: Buffer) -> None:
        """Wait for what the CPU gathers."""
        if buffer.work is not None:
            buffer.work.wait()
            buffer.work = None

    def _gather(self, weights: UnitWeights, buffer: Buffer) -> Any:
        shards, full = weights.transfers(buffer)
        if self._degree == 1:
            return None
        beat()
        # Each (rows on a rank,) of bytes -> (ranks * rows on a rank,), all by one kernel
        return self._all_gather(full, shards, self._options)
