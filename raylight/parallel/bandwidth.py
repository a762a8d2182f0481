"""The links between ranks: whether they transfer data correctly, their bandwidth, and those that are in use."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_CUDA_BYTES, _CPU_BYTES = 32 << 20, 1 << 20
_REPEATS = 3
UNEVEN = 3.0  # a link that is so many times slower than another one is another kind of link
_BUDGET_S = 2.0  # no further pair is measured after this: 64 ranks have two thousand pairs


@dataclass(frozen=True, slots=True)
class Links:
    """The result of a measurement.

    `exact`: every rank received what was sent. `latency_s`: of an all-reduce of one number. `bytes_per_s`: of each pair
    of ranks, one way while both directions are used; pairs are missing if time ran out.
    """

    exact: bool
    latency_s: float
    bytes_per_s: dict[tuple[int, int], float]


_in_use: Links | None = None


def use(links: Links | None) -> None:
    """Take note of the links between the ranks of this world, None if they were not measured. The same on all ranks."""
    global _in_use
    _in_use = links


def slowest_in_use(ranks: Collection[int] | None = None) -> float:
    """Return the bytes per second of the slowest link between these ranks, or all; 0 if none was measured. The same on
    all ranks.
    """
    if _in_use is None:
        return 0.0
    speeds = (
        speed for pair, speed in _in_use.bytes_per_s.items() if ranks is None or (pair[0] in ranks and pair[1] in ranks)
    )
    return min(speeds, default=0.0)


def fast_ranks(links: Links, world_size: int) -> int:
    """Return how many ranks, next to each other, form groups with links that are several times faster than all links
    between groups: the largest such number, which divides `world_size`. 0 if there are no such groups, or if not every
    pair was measured.
    """
    speeds = links.bytes_per_s
    if len(speeds) < world_size * (world_size - 1) // 2:
        return 0
    for size in range(world_size // 2, 1, -1):
        if world_size % size == 0:
            inside = [speed for (one, other), speed in speeds.items() if one // size == other // size]
            between = [speed for (one, other), speed in speeds.items() if one // size != other // size]
            if min(inside) >= UNEVEN * max(between):
                return size
    return 0


def measure(device: torch.device) -> Links:
    """Try an all-reduce, an all-to-all of uneven sizes, and every pair of ranks by itself.

    Collective. Return the same on every rank.
    """
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
    """Send s + d + 1 numbers from each rank s to each rank d, which encode both ranks, and check what arrives."""
    rank, others = dist.get_rank(), torch.arange(dist.get_world_size(), device=device)
    counts = rank + others + 1
    sent = (1000.0 * rank + others).repeat_interleave(counts)
    expected = (1000.0 * others + rank).repeat_interleave(counts)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, counts.tolist(), counts.tolist())
    return torch.equal(received, expected)


def _pair_speed(first: int, second: int, device: torch.device) -> float:
    """Return the bytes per second that each of two ranks receives while both send, the same on every rank.

    It is an all-to-all in which the other ranks are idle: `send` and `recv` would open another connection.
    """
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
    """Return the shortest of a few times of `call`, after one to warm up."""
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
