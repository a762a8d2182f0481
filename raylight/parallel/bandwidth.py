"""The ways between ranks: whether they carry what they should, and how fast each is."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_CUDA_BYTES, _CPU_BYTES = 32 << 20, 1 << 20
_REPEATS = 3
_BUDGET_S = 2.0  # no further pair is begun after that: of 64 workers there are two thousand pairs


@dataclass(frozen=True, slots=True)
class Links:
    """What was measured. `exact` tells whether every rank got what was sent; `latency_s` is of an all-reduce of one
    number; `bytes_per_s` by pair of ranks, each way while both are used, without pairs that there was no time for."""

    exact: bool
    latency_s: float
    bytes_per_s: dict[tuple[int, int], float]


def measure(device: torch.device) -> Links:
    """Try an all-reduce, an all-to-all of uneven pieces, and every pair of ranks alone. Collective; the same on every
    rank."""
    exact = _sums(device) and _exchanges(device)
    latency_s = _seconds(lambda: dist.all_reduce(torch.ones(1, device=device)), device)
    world_size, began = dist.get_world_size(), time.monotonic()
    speeds = {}
    for pair in [(a, b) for a in range(world_size) for b in range(a + 1, world_size)]:
        enough = torch.tensor([int(time.monotonic() - began > _BUDGET_S)], device=device)
        dist.all_reduce(enough, op=dist.ReduceOp.MAX)
        if enough.item():
            break
        speeds[pair] = _pair_speed(*pair, device)
    return Links(_everywhere(exact, device), latency_s, speeds)


def _sums(device: torch.device) -> bool:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    value = torch.full((1000,), float(rank + 1), device=device)
    dist.all_reduce(value)
    return bool((value == world_size * (world_size + 1) / 2).all())


def _exchanges(device: torch.device) -> bool:
    """Rank s sends rank d s + d + 1 numbers that tell where they come from."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    counts = [rank + other + 1 for other in range(world_size)]
    sent = torch.cat(
        [torch.full((count,), float(1000 * rank + other), device=device) for other, count in enumerate(counts)]
    )
    received = torch.empty(sum(counts), device=device)
    dist.all_to_all_single(received, sent, counts, counts)
    expected = torch.cat(
        [torch.full((count,), float(1000 * other + rank), device=device) for other, count in enumerate(counts)]
    )
    return torch.equal(received, expected)


def _pair_speed(first: int, second: int, device: torch.device) -> float:
    """Bytes per second that each of two ranks gets while both send: an all-to-all in which the others are idle, as a
    pair's own send and receive would open a connection of its own."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    nbytes = _CUDA_BYTES if device.type == "cuda" else _CPU_BYTES
    other = {first: second, second: first}.get(rank)
    counts = [nbytes if peer == other else 0 for peer in range(world_size)]
    sent, received = (torch.zeros(sum(counts), dtype=torch.uint8, device=device) for _ in range(2))
    seconds = _seconds(lambda: dist.all_to_all_single(received, sent, counts, counts), device)
    slowest = torch.tensor([seconds if other is not None else 0.0], device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return nbytes / slowest.item()


def _seconds(call, device: torch.device) -> float:
    """The shortest of a few times, after one that warms up."""
    times = []
    for _ in range(_REPEATS + 1):
        _synchronize(device)
        began = time.perf_counter()
        call()
        _synchronize(device)
        times.append(time.perf_counter() - began)
    return max(min(times[1:]), 1e-9)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _everywhere(flag: bool, device: torch.device) -> bool:
    value: Tensor = torch.tensor([int(flag)], device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MIN)
    return bool(value.item())
