"""The collective that gathers a unit's weights into a buffer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions, BroadcastOptions

from raylight.parallel.collectives import all_gather_single
from raylight.parallel.heartbeat import beat

from .gather_buffers import Buffer
from .unit_weights import Part, UnitWeights


class Gatherer:
    """All-gathers the weights of units into buffers, on a GPU on a stream of its own."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, staged_bytes: int) -> None:
        """`staged_bytes` are the most that the offloaded shards of a unit take."""
        self.device = device
        self._staging, self._has_staging = Buffer(staged_bytes), False
        self._group, self._degree = group, dist.get_world_size(group)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._is_forked = False
        self._last = self._staging  # the last buffer that was gathered into
        # PyTorch 2.14 gave it another name.
        self._coalesced = getattr(group, "all_gather_single_coalesced", None) or group.allgather_into_tensor_coalesced
        # With gloo, which ranks that share a GPU use too. It has a coalesced all-gather for the CPU alone, and its two
        # threads note what they have done in one string, without a lock: harmless for names of up to 15 characters,
        # which need no memory, but for that of this collective a write to freed memory, which ends the process later
        # (PyTorch 2.14).
        self._one_by_one = "nccl" not in str(dist.get_backend_config(group))
        self._options = AllgatherOptions()
        self._options.asyncOp = self._stream is None
        self._from_rank = [self._broadcast_options(rank) for rank in range(self._degree)]

    def _broadcast_options(self, rank: int) -> BroadcastOptions:
        options = BroadcastOptions()
        options.rootRank, options.rootTensor, options.asyncOp = rank, 0, self._options.asyncOp
        return options

    def start(self, weights: UnitWeights, buffer: Buffer) -> None:
        """Start to gather the weights of a unit into a buffer that is not used any more. Collective."""
        self._finish(buffer)
        buffer.holds = None  # unless all of it is started
        if not weights.needs_gather:
            buffer.ready = None  # nor may a CUDA graph wait for what was before it
            buffer.holds = weights
            return
        if not self._has_staging:
            self._staging.allocate(self.device)
            self._has_staging = True
        if self._stream is None:
            self._finish(self._last)  # on a GPU the stream does: it may still read the staged shards of another unit
            self._last = buffer
            buffer.work = self._gather(weights, buffer)
            buffer.holds = weights
            return
        # The unit that the buffer had is done where the current stream is now.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        self._is_forked = True
        with torch.cuda.stream(self._stream):
            if (work := self._gather(weights, buffer)) is not None:
                work.wait()  # of this stream, not of the host
            buffer.ready = buffer.ready or torch.cuda.Event()
            buffer.ready.record(self._stream)
        buffer.holds = weights

    def wait(self, buffer: Buffer) -> None:
        """Let the current stream wait until the weights are in the buffer."""
        self._finish(buffer)
        if buffer.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(buffer.ready)

    def end(self, passing: Sequence[Buffer], kept: Collection[Buffer]) -> None:
        """Let the current stream wait for all that was started, and give the memory of the `passing` buffers back."""
        for buffer in (*passing, *kept):
            self._finish(buffer)
        if self._stream is not None and self._is_forked:  # else there is nothing that a CUDA graph could wait for
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
            self._is_forked = False
        for buffer in kept:
            buffer.ready = None  # it is
        for buffer in (*passing, self._staging):
            buffer.free()
        self._has_staging = False

    def _finish(self, buffer: Buffer) -> None:
        """Wait for what the CPU gathers."""
        if buffer.work is not None:
            buffer.work.wait()
            buffer.work = None

    def _gather(self, weights: UnitWeights, buffer: Buffer) -> Any:
        if not weights.is_even:
            return self._broadcast(weights.parts(buffer))
        shards, full = weights.transfers(buffer, self._staging)
        if self._degree == 1:
            return None
        beat()
        # Each (rows on a rank,) of bytes -> (ranks * rows on a rank,)
        if not self._one_by_one:
            return self._coalesced(full, shards, self._options)
        works = [
            all_gather_single(whole, shard, group=self._group, async_op=self._stream is None)
            for whole, shard in zip(full, shards, strict=True)
        ]
        return _All([work for work in works if work is not None])

    def _broadcast(self, parts: Sequence[Part]) -> Any:
        """Start to send each part from the rank that holds it to its place on all others. An all-gather, as NCCL has
        it, wants parts of one size.
        """
        beat()
        if self._stream is None:
            return _All([self._started(part) for part in parts])
        if self._one_by_one:
            for part in parts:
                self._started(part).wait()
            return None
        self._group._start_coalescing(self.device)  # one launch for all of them
        for part in parts:
            self._started(part)
        return self._group._end_coalescing(self.device)

    def _started(self, part: Part) -> Any:
        return self._group.broadcast([part.bytes], self._from_rank[part.rank])


class _All:
    """Several works as one."""

    def __init__(self, works: Sequence[dist.Work]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()
