"""A kernel that looks for tokens by their place gets them as a model without ranks has them."""

from __future__ import annotations

import torch
from torch import Tensor

from raylight.parallel.plan import SelfAttention, Stream
from raylight.parallel.sequence_attention import SequenceAttention
from raylight.parallel.tokens import TokenState

STREAMS = ("txt", "img")


def test_tokens_come_stream_by_stream() -> None:
    tokens = TokenState(0, 2)
    for name, length in (("txt", 3), ("img", 6)):
        tokens.shard(torch.zeros(1, length, 4), Stream(name))
    whole = torch.randn(1, 2, 9, 4)
    places = [place for rank in range(2) for start, stop in tokens.spans(STREAMS, rank) for place in range(start, stop)]
    mask = torch.zeros(1, 1, 9, 9).masked_fill(torch.rand(9, 9) > 0.6, -3.0)
    seen = []

    def strategy(kernel, q: Tensor, k: Tensor, v: Tensor, lengths, mask: Tensor, scale: float | None) -> Tensor:
        gathered = whole[:, :, places]
        return kernel(gathered, gathered, gathered, mask, scale)[:, :, : lengths[0]]

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
        seen.append((q, mask))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)

    kernel.in_order = True
    tokens.push(SelfAttention(STREAMS))
    local = whole[:, :, places[: tokens.lengths(STREAMS)[0]]]
    out = SequenceAttention(tokens, strategy)(kernel, local, local, local, mask, None)
    assert torch.equal(seen[0][0], whole)
    assert torch.equal(seen[0][1], mask)
    expected = torch.nn.functional.scaled_dot_product_attention(whole, whole, whole, mask)[:, :, places]
    assert torch.equal(out, expected[:, :, : out.shape[2]])
