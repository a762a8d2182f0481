"""Plans: streams that do not exist, and the example in the module's docstring."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from toy import TOY_PLAN

from raylight.parallel.plan import Aligned, Gather, SelfAttention, Stream
from raylight.parallel.tokens import TokenState


def test_the_example() -> None:
    for rank, txt, img, rows in ((0, 1, 3, [0, 2, 3, 4]), (1, 1, 2, [1, 5, 6])):
        tokens = TokenState(rank, 2)
        assert tokens.shard(torch.zeros(1, 2, 64), Stream("txt")).shape == (1, txt, 64)
        assert tokens.shard(torch.zeros(1, 5, 64), Stream("img")).shape == (1, img, 64)
        pe = torch.arange(7).view(1, 1, 7, 1).expand(1, 1, 7, 8)
        assert tokens.shard(pe, Aligned(("txt", "img"), dim=2))[0, 0, :, 0].tolist() == rows
        assert tokens.lengths(("txt", "img")) == (4, 3)


@pytest.mark.parametrize(
    "change",
    [{"attention": {"blocks.*": SelfAttention(("audio",))}}, {"outputs": {"head": Gather("img", after=("audio",))}}],
)
def test_rejects_a_stream_that_no_input_introduces(change: dict) -> None:
    with pytest.raises(ValueError, match=r"streams that no input introduces: \['audio'\]"):
        dataclasses.replace(TOY_PLAN, **change)
