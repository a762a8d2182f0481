"""Attention in a split forward: which calls exchange tokens, and which are over full tokens already.

The *kernel* computes softmax(QK')V on this rank; the *strategy* exchanges tokens between ranks around it.

Shapes: B batch rows, H heads, HKV key heads, D head size, S tokens on all ranks, S_LOCAL on this one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from .collectives import all_gather
from .masks import gathered_mask, local_mask, rank_order
from .plan import Attention, CrossAttention, FullAttention, GatherAround, SelfAttention, alternatives
from .tokens import TokenState

logger = logging.getLogger(__name__)


class Kernel(Protocol):
    """Attention on one rank: q (B, H, Sq, D), k and v (B, HKV, Sk, D), mask broadcastable to (B, H, Sq, Sk), either
    boolean (True: attend) or added to the scores. HKV divides H (grouped queries). A `scale` of None is D ** -0.5.

    Return (B, H, Sq, D) of q's dtype. A kernel with an attribute `in_order` that is true gets the tokens of gathered
    streams in the model's order, not in rank order.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor: ...


class Strategy(Protocol):
    """Attention over the tokens of all ranks: q (B, H, S_LOCAL, D), k and v (B, HKV, S_LOCAL, D) of this rank's tokens.

    `lengths[r]` tokens are on rank r. The mask (B|1, H|1, S|1, S) is over all tokens in rank order, for all heads.
    Return (B, H, S_LOCAL, D). Collective.
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
    """Routes each attention call of a forward by the rule of its module in the plan."""

    def __init__(self, tokens: TokenState, strategy: Strategy) -> None:
        self._tokens = tokens
        self.strategy = strategy
        self._logged: set[int] = set()

    def __call__(
        self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
    ) -> Tensor:
        """Attend with q (B, H, S_LOCAL, D), k and v (B, HKV, S_LOCAL, D), or of full tokens where the plan says so.

        Return (B, H, S_LOCAL, D); dtypes, mask and scale as for `Kernel`.

        Raises RuntimeError: when the call does not fit the plan. Attention over a shard would be silently wrong.
        """
        tokens, scope = self._tokens, self._tokens.scope
        mask = None if mask is None else four_dims(mask)
        if not tokens.is_split or isinstance(scope, (GatherAround, FullAttention)):
            tokens.count_full_attention()
            return kernel(q, k, v, mask, scale)
        if scope is None:
            raise RuntimeError("the plan does not say over which tokens this attention call goes")
        queries, keys = q.shape[2], k.shape[2]
        # `scope` is kept so that its id cannot be reused.
        _, rule, lengths, padded = tokens.kept(
            (id(scope), queries, keys), lambda: (scope, *self._resolve(scope, queries, keys))
        )
        streams = rule.streams
        if isinstance(rule, CrossAttention):
            return kernel(q, k, v, None if mask is None else local_mask(tokens, mask, streams), scale)
        tokens.count_call(rule)
        if rule.mask is not None:
            mask = rule.mask(sum(lengths), q)
        if mask is not None:
            mask = self._full_mask(mask, streams, lengths)
        if getattr(kernel, "in_order", False) and len(streams) > 1:
            kernel = self._in_order(kernel, streams)
        if not padded:
            return self.strategy(kernel, q, k, v, lengths, mask, scale)
        q, k, v = (tokens.without_placeholders(t, streams, 2) for t in (q, k, v))
        return tokens.with_placeholders(self.strategy(kernel, q, k, v, lengths, mask, scale), streams, 2)

    def _resolve(
        self, scope: Attention, queries: int, keys: int
    ) -> tuple[SelfAttention | CrossAttention, tuple[int, ...], bool]:
        """Return the rule of a call, the ranks' tokens of its streams, and whether this rank has placeholders."""
        rule = self._rule_of(scope, queries, keys)
        lengths = self._tokens.lengths(rule.streams)
        self._log(sum(lengths))
        return rule, lengths, self._tokens.has_placeholders(rule.streams)

    def _log(self, total: int) -> None:
        """Log once that there are fewer tokens than ranks to split them."""
        if total < self._tokens.degree and total not in self._logged:
            self._logged.add(total)
            logger.info("a sequence has fewer tokens (%d) than workers (%d)", total, self._tokens.degree)

    def _in_order(self, kernel: Kernel, streams: Sequence[str]) -> Kernel:
        """Return the kernel with tokens reordered around it: it gets them stream by stream, not rank by rank."""

        def ordered(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
            to_ranks = rank_order(self._tokens, streams, q.device)  # (S,)
            to_streams = to_ranks.argsort()
            if mask is not None:
                mask = mask.index_select(-1, to_streams)
                mask = mask if mask.shape[-2] == 1 else mask.index_select(-2, to_streams)
            q, k, v = (t.index_select(2, to_streams) for t in (q, k, v))
            out = kernel(q, k, v, mask, scale)
            return out.index_select(2, to_ranks)

        return ordered

    def _rule_of(self, scope: Attention, queries: int, keys: int) -> SelfAttention | CrossAttention:
        """Return the rule of this call, checked against the number of its queries and keys."""
        rules = [rule for rule in alternatives(scope) if not isinstance(rule, FullAttention)]
        expected = {rule: self._tokens.local_length(rule.streams) for rule in rules}
        found = next((rule for rule, length in expected.items() if length == queries), None)
        if found is None:
            tokens = " or ".join(f"{length} tokens of {rule.streams}" for rule, length in expected.items())
            raise RuntimeError(
                f"attention has {queries} queries on rank {self._tokens.rank} where the plan expects {tokens}"
            )
        if isinstance(found, SelfAttention) and keys != queries:
            raise RuntimeError(f"self-attention has {queries} queries but {keys} keys")
        return found

    def _full_mask(self, mask: Tensor, streams: Sequence[str], lengths: Sequence[int]) -> Tensor:
        """Return the mask over all tokens in rank order.

        A mask that the model made of its local tokens is all-gathered. It can only be one of keys, (B|1, H|1, 1,
        S_LOCAL), since no rank knows the queries of another.
        """
        if mask.shape[-2] == 1 and mask.shape[-1] == self._tokens.local_length(streams) != sum(lengths):
            mask = self._tokens.without_placeholders(mask, streams, mask.ndim - 1)
            return all_gather(mask, lengths, mask.ndim - 1, self._tokens.group)
        return gathered_mask(self._tokens, mask, streams)


def four_dims(mask: Tensor) -> Tensor:
    """(Sq, Sk) or (B, Sq, Sk) -> (B|1, 1, Sq, Sk)."""
    if mask.ndim == 2:
        return mask[None, None]
    return mask[:, None] if mask.ndim == 3 else mask
