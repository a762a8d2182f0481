"""How fast the ranks are: a short trial of what transformers spend their time in."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from .process_group import of_all_ranks
from .shares import ALIKE, Speeds

logger = logging.getLogger(__name__)

# Times the slower speed. A trial is short, and GPUs of one kind differ by chance, by their clocks and their heat.
ALIKE_WITHIN, ONE_KIND_WITHIN = 1.05, 1.15
_WHOLE = 1000  # the fastest rank's speed, of which those of others are parts

# On a GPU large enough to fill it, and in half precision, which all have.
_CUDA_SIZE, _CUDA_TOKENS, _CPU_SIZE, _CPU_TOKENS = 4096, 4096, 512, 512
_HEADS, _HEAD_SIZE = 8, 128
_CUDA_BYTES, _CPU_BYTES = 256 << 20, 8 << 20  # more than caches hold
_WARM_UP_S, _TIMED_S, _REPEATS = 0.03, 0.01, 3


@dataclass(frozen=True, slots=True)
class Trial:
    """What each rank has done, in operations per second: of products of matrices, and of attention; and the bytes per
    second that it has read and written. 0 for a rank that could not do it.
    """

    products: tuple[int, ...]
    attention: tuple[int, ...]
    memory: tuple[int, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether all ranks could do it."""
        return 0 not in self.products and 0 not in self.attention

    def speeds(self, within: float = ALIKE_WITHIN) -> Speeds:
        """Return the ranks' speeds; those of which the faster is at most `within` times the slower are the same."""
        if not self.is_complete:
            return ALIKE
        products, attention = _levelled(self.products, within), _levelled(self.attention, within)
        return ALIKE if len({*products}) == len({*attention}) == 1 else Speeds(products, attention)


def measure(device: torch.device) -> Trial:
    """Try all ranks at once, each for about 0.1 s. Collective. Return the same on every rank."""
    on_gpu = device.type == "cuda"
    size, tokens = (_CUDA_SIZE, _CUDA_TOKENS) if on_gpu else (_CPU_SIZE, _CPU_TOKENS)
    dtype = torch.float16 if on_gpu else torch.float32
    products = attention = memory = 0
    try:
        with torch.inference_mode():
            products, attention = _products(size, device, dtype), _attention(tokens, device, dtype)
            memory = _memory(_CUDA_BYTES if on_gpu else _CPU_BYTES, device)
    except RuntimeError as error:  # out of memory, or no kernel: work goes on, with equal shares
        logger.warning("the speed of this worker could not be tried: %s", error)
    if on_gpu:
        torch.cuda.empty_cache()
    return Trial(tuple(of_all_ranks(products)), tuple(of_all_ranks(attention)), tuple(of_all_ranks(memory)))


def _products(size: int, device: torch.device, dtype: torch.dtype) -> int:
    """Return the operations per second of the product of two matrices (size, size)."""
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    return int(2 * size**3 / _seconds(lambda: matrix @ matrix, device))


def _attention(tokens: int, device: torch.device, dtype: torch.dtype) -> int:
    """Return the operations per second of attention of PyTorch's choice over so many tokens."""
    q = torch.randn(1, _HEADS, tokens, _HEAD_SIZE, device=device, dtype=dtype)
    seconds = _seconds(lambda: functional.scaled_dot_product_attention(q, q, q), device)
    return int(4 * _HEADS * tokens**2 * _HEAD_SIZE / seconds)


def _memory(nbytes: int, device: torch.device) -> int:
    """Return the bytes per second that are read and written by an operator on so many bytes."""
    source = torch.zeros(nbytes // 2, device=device, dtype=torch.float16)
    result = torch.empty_like(source)
    return int(2 * nbytes / _seconds(lambda: torch.neg(source, out=result), device))


def _seconds(call: Callable[[], torch.Tensor], device: torch.device) -> float:
    """Return the shortest of a few times of `call`, each the mean of some calls, after some to raise the clock."""
    once = _timed(call, 1, device)
    began = time.perf_counter()
    while time.perf_counter() - began < _WARM_UP_S:
        once = _timed(call, 1, device)
    calls = max(1, round(_TIMED_S / once))
    return max(min(_timed(call, calls, device) for _ in range(_REPEATS)), 1e-9)


def _timed(call: Callable[[], torch.Tensor], calls: int, device: torch.device) -> float:
    """Return the seconds of one of several calls; on a GPU without what launching them takes."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(calls):
            call()
        return max((time.perf_counter() - began) / calls, 1e-9)
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(calls):
        call()
    ended.record()
    ended.synchronize()
    return max(began.elapsed_time(ended) / 1000 / calls, 1e-9)


def _levelled(measured: Sequence[int], within: float) -> tuple[int, ...]:
    """Return speeds relative to the fastest, `_WHOLE`. Ranks that are alike have the mean of their speeds."""
    level: dict[int, float] = {}
    group: list[int] = []
    for one in sorted(measured, reverse=True):
        if group and group[0] > within * one:
            group = []
        group.append(one)
        level.update(dict.fromkeys(group, sum(group) / len(group)))
    fastest = max(level.values())
    return tuple(max(1, round(_WHOLE * level[one] / fastest)) for one in measured)
