"""The error of an exchange in 8 bits, measured where it is made: in some attention calls of a run's first forward.

Such a call is made twice, with an exact exchange too. Both are collective, so all ranks must measure the same calls:
all of them make the first forward of a run without a graph. Sums stay on the device until they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from .eight_bit_ulysses import EightBitUlysses
from .eight_bits import decode, encode
from .ring import HybridAttention
from .sequence_attention import Kernel, Strategy
from .ulysses import UlyssesAttention


@dataclass(frozen=True, slots=True)
class ExchangeError:
    """Relative L2 errors of `calls` attention calls, on one rank: of the tensors that are sent before attention, and
    of its result; of all calls together, and in the call where it is largest.
    """

    calls: int
    inputs: float
    largest_input: float
    result: float
    largest_result: float

    def __str__(self) -> str:
        return (
            f"changed what attention gets by {self.inputs:.2%} (at most {self.largest_input:.2%}), and its result by "
            f"{self.result:.2%} (at most {self.largest_result:.2%})"
        )


class ErrorMeter:
    """The error of one model's exchanges in one run."""

    def __init__(self) -> None:
        self._forwards: int | None = None  # None: closed
        self._calls = 0
        self._sums: list[Tensor] = []

    def begin(self) -> None:
        """Measure calls of the forward that follows."""
        self.clear()
        self._forwards, self._calls = 0, 0

    def clear(self) -> None:
        """Measure nothing more, and forget what was measured."""
        self._forwards = None
        self._sums.clear()

    def begins_forward(self) -> bool:
        """Take note that a forward begins; return whether it is the one to be measured, so that no rank may replay
        it. Where nothing can be replayed this need not be called.
        """
        if self._forwards is None:
            return False
        self._forwards += 1
        if self._forwards > 1:
            self._forwards = None
        return self._forwards is not None

    def wants(self) -> bool:
        """Return whether to measure the call that follows: the first, second, fourth, eighth ..., so that all depths of
        a model count and few calls are made twice. The same on all ranks.
        """
        if self._forwards is None:
            return False
        self._calls += 1
        return self._calls & (self._calls - 1) == 0

    def add(self, sent: Sequence[Tensor], exact: Tensor, result: Tensor) -> None:
        """Measure a call. What it sends before attention is `sent`, each (B, H, S_LOCAL, D); its results by an exact
        exchange and by one in 8 bits are of one shape.
        """
        inputs = [_squares(decode(encode(one), one.shape[-1], one.dtype), one) for one in sent]
        self._sums.append(torch.cat([torch.stack(inputs).sum(0), _squares(result, exact)]))

    def end(self) -> ExchangeError | None:
        """End a run's measurement, and return what it was; None if there was no such call, or this rank has no tokens
        in any. Waits for the device.
        """
        found = self._sums.copy()
        self.clear()
        if not found:
            return None
        sums = torch.stack(found).double().cpu()  # (calls, 4)
        sums = sums[(sums[:, 1] != 0) & (sums[:, 3] != 0)]
        if not len(sums):
            return None
        each, of_all = ((one[..., 0::2] / one[..., 1::2]).sqrt() for one in (sums, sums.sum(0)))
        largest = each.amax(0)
        return ExchangeError(len(sums), of_all[0].item(), largest[0].item(), of_all[1].item(), largest[1].item())


class MeasuredAttention:
    """A strategy in 8 bits, whose error a meter may want to know. `exact` does the same with an exact exchange."""

    def __init__(self, in_8_bits: Strategy, exact: Strategy, ulysses_degree: int, meter: ErrorMeter) -> None:
        self._in_8_bits, self.exact, self._meter = in_8_bits, exact, meter
        # Asked at each call, also by compiled code, which would keep the answer, and not on all ranks alike.
        self._wants = cast("Callable[[], bool]", torch.compiler.disable(meter.wants))
        self._sends_queries = ulysses_degree > 1  # a ring does not

    @property
    def degrees(self) -> tuple[int, int]:
        """As those of `HybridAttention`."""
        return getattr(self.exact, "degrees", (1, 1))

    def __call__(
        self,
        kernel: Kernel,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int],
        mask: Tensor | None,
        scale: float | None,
    ) -> Tensor:
        """As `Strategy`."""
        if not self._wants():
            return self._in_8_bits(kernel, q, k, v, lengths, mask, scale)
        exact = self.exact(kernel, q, k, v, lengths, mask, scale)
        result = self._in_8_bits(kernel, q, k, v, lengths, mask, scale)
        self._meter.add((q, k, v) if self._sends_queries else (k, v), exact, result)
        return result


def hybrid_attention(ulysses: dist.ProcessGroup, ring: dist.ProcessGroup, meter: ErrorMeter | None) -> Strategy:
    """Return the hybrid of Ulysses and ring; in 8 bits if there is a `meter` for the error."""
    exact = HybridAttention(ulysses, ring)
    if meter is None:
        return exact
    return MeasuredAttention(HybridAttention(ulysses, ring, in_8_bits=True), exact, exact.degrees[0], meter)


def ulysses_attention(group: dist.ProcessGroup, meter: ErrorMeter | None) -> Strategy:
    """Return Ulysses among all ranks of a group; in 8 bits if there is a `meter` for the error."""
    exact = UlyssesAttention(group)
    if meter is None:
        return exact
    return MeasuredAttention(EightBitUlysses(group), exact, dist.get_world_size(group), meter)


def exact_of(strategy: Strategy) -> Strategy:
    """Return what does the same as a strategy with an exact exchange."""
    return getattr(strategy, "exact", strategy)


def _squares(actual: Tensor, expected: Tensor) -> Tensor:
    """Return the sums of squares of the difference and of what is expected: (2,) float32."""
    norms = (torch.linalg.vector_norm(one, dtype=torch.float32) for one in (actual - expected, expected))
    return torch.stack([norm.square() for norm in norms])
