"""Capture of a function's GPU work as a CUDA graph, the memory that this takes, and recovery from a failed capture."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch

logger = logging.getLogger(__name__)

MARGIN_BYTES = 512 * 2**20  # left free beside a graph, for what is outside of it
_GROWTH = 1.1  # of a forward's memory, as a graph's pool is divided in another way


@dataclass(frozen=True, slots=True)
class Cost:
    """What one ordinary forward took: seconds until the host had launched it, seconds until the GPU had done it, and
    the most bytes of GPU memory that were in use at once, beside what was in use before.
    """

    launch_s: float
    total_s: float
    peak_bytes: int


class Captured(Protocol):
    """A captured function."""

    def replay(self) -> Any:
        """Do the captured work again; return the output, whose tensors the next replay overwrites."""
        ...


class Backend(Protocol):
    """How functions are captured on one device."""

    device: torch.device

    def measured(self, function: Callable[[], Any]) -> tuple[Any, Cost]:
        """Call a function, and wait for the GPU; return its result and what it took."""
        ...

    def shortage(self, cost: Cost) -> int:
        """Return how many bytes of GPU memory are missing to capture a forward that took so much, and to run another
        without a graph afterwards; 0 if none.
        """
        ...

    def capture(self, function: Callable[[], Any]) -> Captured:
        """Capture a function, which is not executed. Raises what it raises, and RuntimeError for what CUDA refuses."""
        ...

    @property
    def held_bytes(self) -> int:
        """The bytes that graphs keep to themselves."""
        ...

    def released(self) -> None:
        """Take note that no graph is left."""
        ...


class CudaBackend:
    """CUDA graphs on one GPU. They share a pool of memory, since one only is replayed at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._held_bytes = 0
        self._failed: list[Any] = []

    def measured(self, function: Callable[[], Any]) -> tuple[Any, Cost]:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before, start = torch.cuda.memory_allocated(self.device), time.perf_counter()
        result = function()
        launched = time.perf_counter()
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        return result, Cost(launched - start, time.perf_counter() - start, peak)

    def shortage(self, cost: Cost) -> int:
        free, _ = torch.cuda.mem_get_info(self.device)
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return max(0, int(cost.peak_bytes * (_GROWTH + 1)) + MARGIN_BYTES - free - unused)

    @property
    def held_bytes(self) -> int:
        return self._held_bytes

    def released(self) -> None:
        # A pool of its own for what comes next: the memory of this one is free as soon as its graphs are gone.
        self._pool, self._held_bytes = None, 0
        torch.cuda.empty_cache()

    def capture(self, function: Callable[[], Any]) -> Captured:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # what eager forwards keep for later is for the graph now
        before = torch.cuda.memory_reserved(self.device)
        random = torch.cuda.get_rng_state(self.device)
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        # What is collected by chance within a capture may call what CUDA forbids there.
        collects = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.stream(self._stream):
                # Only this thread's calls may fail it: NCCL's watchdog and the reports have threads of their own.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    output = function()
                finally:
                    graph.capture_end()
        except BaseException:
            self._recover(graph, random)
            raise
        finally:
            if collects:
                gc.enable()
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        self._held_bytes += max(0, torch.cuda.memory_reserved(self.device) - before)
        return _CudaGraph(graph, output)

    def _recover(self, graph: torch.cuda.CUDAGraph, random: torch.Tensor) -> None:
        """Bring the allocator and the random generator back from a capture that has failed.

        If CUDA has invalidated the capture, PyTorch leaves both as they are within one.
        """
        index = torch.cuda._utils._get_device_index(self.device)
        with suppress(RuntimeError):  # it was ended as it should be
            torch._C._cuda_endAllocateToPool(index, self._pool)
            torch._C._cuda_releasePool(index, self._pool)
        graph.reset()
        self._failed.append(graph)  # the allocator of pinned memory may still refer to it
        fresh = torch.Generator(self.device)
        fresh.set_state(random)
        torch.cuda.default_generators[index].graphsafe_set_state(fresh)
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True)
class _CudaGraph:
    graph: torch.cuda.CUDAGraph
    output: Any

    def replay(self) -> Any:
        self.graph.replay()
        return self.output
