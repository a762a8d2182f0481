"""What a plan and a model must have in common, and calls that would be silently wrong."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from toy import TOY_PLAN, Toy, plain_kernel

from raylight.parallel.attention import SequenceAttention
from raylight.parallel.hooks import SequenceHooks
from raylight.parallel.plan import Gather, SelfAttention, Stream, Whole
from raylight.parallel.tokens import TokenState


class Passing(torch.nn.Module):
    def forward(self, img: torch.Tensor) -> torch.Tensor:
        return img


class Forgetful(torch.nn.Module):
    """Leaves out the block at which tokens are gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.blocks = 5, torch.nn.ModuleList([Passing(), Passing()])

    def forward(self, img: torch.Tensor) -> torch.Tensor:
        return self.blocks[0](img)


def install(plan=TOY_PLAN, heads: int = 5, degree: int = 2) -> SequenceHooks:
    return SequenceHooks(Toy(heads, heads), plan, TokenState(0, degree))


def test_remove_leaves_the_model_as_it_was() -> None:
    model = Toy()
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    hooks = SequenceHooks(model, TOY_PLAN, TokenState(0, 2))
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] != before
    hooks.remove()
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == before


def test_rejects_fewer_heads_than_ranks() -> None:
    with pytest.raises(ValueError, match="Toy has 5 attention heads, too few for ulysses_degree = 6: choose at most 5"):
        install(degree=6)


def test_rejects_a_module_that_is_not_there() -> None:
    plan = dataclasses.replace(TOY_PLAN, outputs={"tail": Gather("img")})
    with pytest.raises(ValueError, match="names 'tail', which this Toy does not have"):
        install(plan)


def test_rejects_an_argument_that_is_not_there() -> None:
    plan = dataclasses.replace(TOY_PLAN, inputs={"blocks.*": {"img": Stream("img"), "text": Stream("txt")}})
    with pytest.raises(ValueError, match=r"\['text'\] of 'blocks.\*', but Joint.forward has .* Update ComfyUI"):
        install(plan)


def test_an_argument_may_go_into_kwargs() -> None:
    model = Toy()
    inner = model.blocks[0].forward
    for block in model.blocks:
        block.forward = lambda txt, img, **kwargs: inner(txt, img, **kwargs)
    SequenceHooks(model, TOY_PLAN, TokenState(0, 2)).remove()


def test_rejects_a_stream_that_never_enters() -> None:
    with pytest.raises(ValueError, match=r"streams that never enter: \['audio'\]"):
        dataclasses.replace(TOY_PLAN, attention={"blocks.*": SelfAttention(("audio",))})


def test_rejects_tokens_before_a_gather_that_never_enter() -> None:
    with pytest.raises(ValueError, match=r"streams that never enter: \['audio'\]"):
        dataclasses.replace(TOY_PLAN, outputs={"head": Gather("img", after=("audio",))})


def test_rejects_attention_that_no_plan_covers() -> None:
    tokens = TokenState(0, 2)
    tokens.localize(torch.zeros(1, 6, 4), Stream("x"))
    attention = SequenceAttention(tokens, None)
    with pytest.raises(RuntimeError, match="does not say over which tokens"):
        attention(plain_kernel, *(torch.zeros(1, 2, 3, 4) for _ in range(3)), None, None)


def test_rejects_attention_over_other_tokens_than_planned() -> None:
    tokens = TokenState(0, 2)
    tokens.localize(torch.zeros(1, 6, 4), Stream("x"))
    tokens.push(SelfAttention(("x",)))
    attention = SequenceAttention(tokens, None)
    with pytest.raises(RuntimeError, match="6 queries on rank 0 where the plan expects 3"):
        attention(plain_kernel, *(torch.zeros(1, 2, 6, 4) for _ in range(3)), None, None)


def test_attention_before_the_split_is_left_alone() -> None:
    q = torch.randn(1, 2, 5, 4)
    attention = SequenceAttention(TokenState(0, 2), None)
    assert torch.equal(attention(plain_kernel, q, q, q, None, None), plain_kernel(q, q, q, None, None))


def test_attention_in_a_module_that_runs_whole_is_left_alone() -> None:
    tokens = TokenState(0, 2)
    tokens.localize(torch.zeros(1, 6, 4), Stream("x"))
    tokens.push(Whole("x"))
    q = torch.randn(1, 2, 6, 4)
    attention = SequenceAttention(tokens, None)
    assert torch.equal(attention(plain_kernel, q, q, q, None, None), plain_kernel(q, q, q, None, None))
    assert attention.counts.exchanged == 0


def test_rejects_a_model_whose_tokens_stay_split() -> None:
    plan = dataclasses.replace(TOY_PLAN, inputs={"blocks.0": {"img": Stream("img")}}, attention={},
                               outputs={"blocks.1": Gather("img")})
    model = Forgetful()
    SequenceHooks(model, plan, TokenState(0, 2))
    with pytest.raises(RuntimeError, match=r"tokens still split: \['img'\]"):
        model(torch.zeros(1, 4, 8))
