"""Times and errors of calls on a device."""

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
