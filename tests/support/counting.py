"""Attention that counts what it is called with: evidence that a plan splits tokens and heads. And a count of what ranks
gather.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from raylight.sharding.gatherer import Gatherer
from raylight.sharding.unit_weights import UnitWeights


class CountingKernel:
    """A kernel that records in `heads` how many heads (B, H, S, D) each call has."""

    def __init__(self, inner: Any, heads: list[int] | None = None) -> None:
        self._inner, self.heads = inner, [] if heads is None else heads

    def __call__(self, q: Tensor, *rest: Any) -> Tensor:
        self.heads.append(q.shape[1])
        return self._inner(q, *rest)

    def with_lse(self, q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        self.heads.append(q.shape[1])
        return self._inner.with_lse(q, *rest)


class CountingStrategy:
    """A strategy that counts its `calls`, the largest share of all tokens that a rank had in one, and the `heads` of
    its kernel.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.calls = 0
        self.largest_share = 0.0
        self.heads: list[int] = []

    def __call__(self, kernel: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], *rest: Any) -> Tensor:
        self.calls += 1
        self.largest_share = max(self.largest_share, q.shape[2] / sum(lengths))
        return self._inner(CountingKernel(kernel, self.heads), q, k, v, lengths, *rest)


class CountingGathers(TorchDispatchMode):
    """Counts in `gathered` the bytes that this rank has after the all-gathers within it, and in `sent` those that it
    gave to them, as c10d is given both. `names` are those of all collectives that c10d is asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gathered = self.sent = 0
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.names.add(func.name())
        if func.namespace == "c10d" and "gather" in func.name():
            # Each takes its outputs first and then its inputs.
            self.gathered, self.sent = self.gathered + _nbytes(args[0]), self.sent + _nbytes(args[1])
        return func(*args, **(kwargs or {}))

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with a count of its own gathers only, where some classes of tensors take no modes."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return counted


def _nbytes(tensors: Any) -> int:
    return tensors.nbytes if isinstance(tensors, torch.Tensor) else sum(map(_nbytes, tensors))


@contextmanager
def gathered() -> Iterator[list[UnitWeights]]:
    """Within it, collect the units that any gatherer gathers."""
    found: list[UnitWeights] = []
    start = Gatherer.start

    def counted(self: Gatherer, weights: UnitWeights, buffer: Any) -> None:
        found.append(weights)
        start(self, weights, buffer)

    Gatherer.start = counted
    try:
        yield found
    finally:
        Gatherer.start = start
