"""Attention of one rank: calls that do not fit the plan, and the tokens that a kernel gets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toy import plain_kernel

from raylight.parallel.masks import rank_order
from raylight.parallel.plan import GatherAround, SelfAttention, Stream
from raylight.parallel.sequence_attention import SequenceAttention
from raylight.parallel.tokens import TokenState

STREAMS = ("txt", "img")


@pytest.mark.parametrize("txt", [3, 1])
def test_a_kernel_may_get_tokens_stream_by_stream(txt: int) -> None:
    tokens, total = TokenState(0, 2), txt + 6
    for name, length in (("txt", txt), ("img", 6)):
        tokens.shard(torch.zeros(1, length, 4), Stream(name))
    full = torch.randn(1, 2, total, 4)
    order = rank_order(tokens, STREAMS, full.device)
    mask = torch.zeros(1, 1, total, total).masked_fill(torch.rand(total, total) > 0.6, -3.0)
    seen = []

    def strategy(kernel, q: Tensor, k: Tensor, v: Tensor, lengths, mask: Tensor, scale: float | None) -> Tensor:
        gathered = full[:, :, order]
        return kernel(gathered, gathered, gathered, mask, scale)[:, :, : lengths[0]]

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
        seen.append((q, mask))
        return plain_kernel(q, k, v, mask, scale)

    kernel.in_order = True
    tokens.push(SelfAttention(STREAMS))
    own = full[:, :, order[: tokens.lengths(STREAMS)[0]]]
    local = tokens.with_placeholders(own, STREAMS, 2)
    out = SequenceAttention(tokens, strategy)(kernel, local, local, local, mask, None)
    assert torch.equal(seen[0][0], full)
    assert torch.equal(seen[0][1], mask)
    assert out.shape == local.shape
    expected = plain_kernel(full, full, full, mask, None)[:, :, order]
    assert torch.equal(tokens.without_placeholders(out, STREAMS, 2), expected[:, :, : own.shape[2]])


def test_rejects_attention_that_no_plan_covers() -> None:
    tokens = TokenState(0, 2)
    tokens.shard(torch.zeros(1, 6, 4), Stream("x"))
    attention = SequenceAttention(tokens, None)
    with pytest.raises(RuntimeError, match="does not say over which tokens"):
        attention(plain_kernel, *(torch.zeros(1, 2, 3, 4) for _ in range(3)), None, None)


def test_rejects_attention_over_other_tokens_than_planned() -> None:
    tokens = TokenState(0, 2)
    tokens.shard(torch.zeros(1, 6, 4), Stream("x"))
    tokens.push(SelfAttention(("x",)))
    attention = SequenceAttention(tokens, None)
    with pytest.raises(RuntimeError, match="6 queries on rank 0 where the plan expects 3"):
        attention(plain_kernel, *(torch.zeros(1, 2, 6, 4) for _ in range(3)), None, None)


def test_attention_before_the_split_is_left_alone() -> None:
    q = torch.randn(1, 2, 5, 4)
    attention = SequenceAttention(TokenState(0, 2), None)
    assert torch.equal(attention(plain_kernel, q, q, q, None, None), plain_kernel(q, q, q, None, None))


def test_a_rank_without_tokens_takes_part_in_the_exchange(caplog: pytest.LogCaptureFixture) -> None:
    tokens, exchanged = TokenState(0, 2), []
    tokens.shard(torch.zeros(1, 1, 4), Stream("x"))
    tokens.push(SelfAttention(("x",)))

    def strategy(kernel, q, k, v, lengths, mask, scale):
        exchanged.append((lengths, *(t.shape[2] for t in (q, k, v))))
        return q

    attention = SequenceAttention(tokens, strategy)
    placeholder = torch.randn(1, 2, 1, 4)
    with caplog.at_level("INFO"):
        for _ in range(2):
            out = attention(plain_kernel, placeholder, placeholder, placeholder, None, None)
            assert torch.equal(out, torch.zeros_like(placeholder))
    assert exchanged == [((0, 1), 0, 0, 0)] * 2
    assert caplog.messages == ["a sequence has fewer tokens (1) than workers (2)"]


def test_attention_to_gathered_tokens_is_left_alone() -> None:
    tokens = TokenState(0, 2)
    tokens.shard(torch.zeros(1, 6, 4), Stream("x"))
    tokens.push(GatherAround("x"))
    q = torch.randn(1, 2, 6, 4)
    attention = SequenceAttention(tokens, None)
    assert torch.equal(attention(plain_kernel, q, q, q, None, None), plain_kernel(q, q, q, None, None))
