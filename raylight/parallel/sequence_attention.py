"""Attention of a split sequence: which calls exchange tokens, and which are already whole.

The *kernel* computes softmax(QK')V on this rank; the *strategy* is what ranks exchange around it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .collectives import all_gather
from .plan import Attention, CrossAttention, FullAttention, GatherAround, SelfAttention, alternatives
from .tokens import TokenState

logger = logging.getLogger(__name__)


class Kernel(Protocol):
    """Attention on one rank: q (B, H, Sq, D), k and v (B, Hkv, Sk, D), mask broadcastable to (B, H, Sq, Sk).

    `Hkv` divides `H` (grouped queries). `scale` None stands for D ** -0.5. Returns (B, H, Sq, D).
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor: ...


class Strategy(Protocol):
    """Attention over the tokens of all ranks; `lengths[r]` tokens are on rank r, in rank order.

    The mask is over the gathered tokens in rank order, its heads whole.
    """

    def __call__(
        self,
        kernel: Kernel,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int],
        mask: Tensor | None,
        scale: float | None,
    ) -> Tensor: ...


class SequenceAttention:
    """Routes each attention call of a forward by what its module's plan says."""

    def __init__(self, tokens: TokenState, strategy: Strategy) -> None:
        self._tokens = tokens
        self.strategy = strategy
        self._told: set[int] = set()

    def __call__(
        self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
    ) -> Tensor:
        """Attention of local q (B, H, Sq, D), k and v (B, Hkv, Sk, D); shapes and meaning as in `Kernel`.

        Raises RuntimeError where the call does not fit the plan: attending over a shard would be wrong silently.
        """
        tokens, scope = self._tokens, self._tokens.scope
        if not tokens.is_split or isinstance(scope, (GatherAround, FullAttention)):
            tokens.count_whole()
            return kernel(q, k, v, mask, scale)
        if scope is None:
            raise RuntimeError("the plan does not say over which tokens this attention call goes")
        scope = self._kind(scope, q, k)
        streams = _queries(scope)
        lengths = tokens.lengths(streams)
        self._tell(sum(lengths))
        if isinstance(scope, CrossAttention):
            local_mask = None if mask is None else tokens.local_mask_rows(_four_dims(mask), streams)
            return kernel(q, k, v, local_mask, scale)
        tokens.count(scope)
        if scope.mask is not None:
            mask = scope.mask(sum(lengths), q)
        whole_mask = None if mask is None else self._whole_mask(_four_dims(mask), streams, lengths)
        if getattr(kernel, "in_order", False) and len(streams) > 1:
            kernel = self._in_order(kernel, streams)
        q, k, v = (tokens.own(t, streams, 2) for t in (q, k, v))
        return tokens.filled(self.strategy(kernel, q, k, v, lengths, whole_mask, scale), streams, 2)

    def _tell(self, total: int) -> None:
        """Say once that there are fewer tokens than ranks to split them."""
        if total < self._tokens.degree and total not in self._told:
            self._told.add(total)
            logger.info(
                "a sequence has fewer tokens than there are workers: only %d of %d have a part of it",
                total,
                self._tokens.degree,
            )

    def _in_order(self, kernel: Kernel, streams: Sequence[str]) -> Kernel:
        """The kernel as one that is given tokens stream by stream, as a model without ranks has them, and not in rank
        order, in which every rank's own of all streams come together."""
        tokens = self._tokens
        order = torch.cat(
            [torch.arange(start, stop) for rank in range(tokens.degree) for start, stop in tokens.spans(streams, rank)]
        )

        def ordered(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
            places = order.to(q.device)
            back = places.argsort()
            if mask is not None:
                mask = mask.index_select(-1, back)
                mask = mask if mask.shape[-2] == 1 else mask.index_select(-2, back)
            out = kernel(*(t.index_select(2, back) for t in (q, k, v)), mask, scale)
            return out.index_select(2, places)

        return ordered

    def _kind(self, scope: Attention, q: Tensor, k: Tensor) -> SelfAttention | CrossAttention:
        """What the plan says of this call, checked against its queries and keys."""
        rank, kinds = self._tokens.rank, alternatives(scope)
        expected = {kind: self._tokens.held(_queries(kind)) for kind in kinds}
        found = next((kind for kind in kinds if expected[kind] == q.shape[2]), None)
        if found is None:
            tokens = " or ".join(f"{count} tokens of {_queries(kind)}" for kind, count in expected.items())
            raise RuntimeError(f"attention has {q.shape[2]} queries on rank {rank} where the plan expects {tokens}")
        if isinstance(found, SelfAttention) and k.shape[2] != q.shape[2]:
            raise RuntimeError(f"self-attention has {q.shape[2]} queries but {k.shape[2]} keys")
        return found

    def _whole_mask(self, mask: Tensor, streams: Sequence[str], lengths: Sequence[int]) -> Tensor:
        """The mask over all tokens in rank order. One that a model made of its local tokens is joined; it can only
        be one of keys, since no rank knows another's queries."""
        if mask.shape[-2] == 1 and mask.shape[-1] == self._tokens.held(streams) != sum(lengths):
            mask = self._tokens.own(mask, streams, mask.ndim - 1)
            return all_gather(mask, lengths, mask.ndim - 1, self._tokens.group)
        return self._tokens.gathered_mask(mask, streams)


def _queries(kind: SelfAttention | CrossAttention) -> tuple[str, ...]:
    return kind.query if isinstance(kind, CrossAttention) else kind.streams


def _four_dims(mask: Tensor) -> Tensor:
    """(Sq, Sk) or (B, Sq, Sk) as (B|1, 1, Sq, Sk)."""
    if mask.ndim == 2:
        return mask[None, None]
    return mask[:, None] if mask.ndim == 3 else mask
