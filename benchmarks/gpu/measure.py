"""Times, errors and communication of calls on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def synchronize(device: torch.device) -> None:
    """Wait until `device` is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def mark(device: torch.device) -> Any:
    """Return a point in time of the work on `device`, for `between`."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Any, end: Any) -> float:
    """Return the seconds between two marks. The device must be idle."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def median(function: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Return the median seconds of a call, after one to warm up."""
    function()
    marks = []
    for _ in range(repeats):
        start = mark(device)
        function()
        marks.append((start, mark(device)))
    synchronize(device)
    return statistics.median(between(*pair) for pair in marks)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Return the relative L2 error, infinity if it is not a number."""
    error = ((actual.float() - expected.float()).norm() / expected.float().norm()).item()
    return error if error == error else float("inf")


def communication(forward: Any, device: torch.device) -> tuple[float, float]:
    """Return the shares of a step in which NCCL's kernels run, and in which no other kernel does."""
    if device.type != "cuda":
        forward()
        return 0.0, 0.0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        forward()
        synchronize(device)
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = {True: [], False: []}
    for event in events:
        spans["nccl" in event.name.lower()].append((event.time_range.start, event.time_range.end))
    everything = spans[True] + spans[False]
    if not everything:
        return 0.0, 0.0
    total = max(end for _, end in everything) - min(start for start, _ in everything)
    computing = covered(spans[False])
    return covered(spans[True]) / total, (covered(everything) - computing) / total


def kernels_of(call: Callable[[], Any], device: torch.device, most: int = 16) -> list[str]:
    """Return the kernels of a call that took longest, with their milliseconds and number, after the sum of all."""
    if device.type != "cuda":
        call()
        return []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        call()
        synchronize(device)
    found = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in found)
    lines = [f"all kernels {total / 1e3:.1f} ms"]
    return lines + [f"{e.self_device_time_total / 1e3:9.2f} ms {e.count:6d} x {e.key[:110]}" for e in found[:most]]


def covered(spans: list[tuple[float, float]]) -> float:
    """Return the length of the union of spans."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length
