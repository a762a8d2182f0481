"""Attention that counts what it is called with: evidence that a plan splits tokens and heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


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
