"""Hooks: what a plan and a model must have in common, and attention that bypasses Raylight."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from toy import TOY_PLAN, Toy, plain_kernel

from raylight.parallel.full_tokens import full_attention
from raylight.parallel.hooks import SequenceHooks
from raylight.parallel.plan import Gather, GatherAround, SelfAttention, SequencePlan, Stream
from raylight.parallel.sequence_attention import SequenceAttention
from raylight.parallel.tokens import TokenState


class Passing(torch.nn.Module):
    def forward(self, img: torch.Tensor) -> torch.Tensor:
        return img


class Forgetful(torch.nn.Module):
    """A model that skips the block at which tokens are gathered."""

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


def test_rejects_a_model_whose_tokens_stay_split() -> None:
    plan = dataclasses.replace(
        TOY_PLAN, inputs={"blocks.0": {"img": Stream("img")}}, attention={}, outputs={"blocks.1": Gather("img")}
    )
    model = Forgetful()
    SequenceHooks(model, plan, TokenState(0, 2))
    with pytest.raises(RuntimeError, match=r"tokens still split: \['img'\]"):
        model(torch.zeros(1, 4, 8))


class Block(torch.nn.Module):
    """A block with one attention call, `attention(x, options)` of tokens (B, S, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = through_options

    def forward(self, x: torch.Tensor, transformer_options: dict) -> torch.Tensor:
        return x + self.attention(x, transformer_options)


class OneBlock(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.block = 2, Block()

    def forward(self, x: torch.Tensor, transformer_options: dict) -> torch.Tensor:
        return self.block(x, transformer_options)


ONE_BLOCK = SequencePlan(
    "test.OneBlock", {"block": {"x": Stream("x")}}, {"block": SelfAttention(("x",))}, {"block": Gather("x")}
)


def heads_of(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


def through_options(x: torch.Tensor, options: dict) -> torch.Tensor:
    out = options["attention"](plain_kernel, *(heads_of(x) for _ in range(3)), None, None)
    return out.transpose(1, 2).flatten(2)


def without_options(x: torch.Tensor, _: dict) -> torch.Tensor:
    """Attend only to the tokens that are given, as attention of a node may."""
    return plain_kernel(*(heads_of(x) for _ in range(3)), None, None).transpose(1, 2).flatten(2)


def run_block(attention, degree: int = 2, calls=1, full=None) -> list[int]:
    """Run rank 0 of a model with this attention in its block. Return the number of tokens of each exchange."""
    seen: list[int] = []

    def strategy(kernel, q, k, v, lengths, mask, scale):
        seen.append(sum(lengths))
        return q

    model, tokens = OneBlock(), TokenState(0, degree)
    model.block.attention = attention if full is None else lambda x, options: full(tokens, x, options)
    plan = dataclasses.replace(ONE_BLOCK, attention={"block": SelfAttention(("x",), calls=calls)}, outputs={})
    SequenceHooks(model, plan, tokens)
    model(torch.randn(1, 6, 8), {"attention": SequenceAttention(tokens, strategy)})
    return seen


def test_attention_that_a_node_replaced_ends_the_run() -> None:
    assert run_block(through_options) == [6]
    with pytest.raises(
        RuntimeError,
        match=r"attention of a Block did not reach Raylight \(0 of 1 calls did\).*"
        r"Remove the node .*, or use GPU = 1 or cfg_degree",
    ):
        run_block(without_options)


def test_fewer_calls_than_planned_end_the_run() -> None:
    with pytest.raises(RuntimeError, match="1 of 2 calls did"):
        run_block(through_options, calls=lambda block: 2 if isinstance(block, Block) else 1)


def test_attention_to_full_tokens_is_no_bypass() -> None:
    assert run_block(without_options, degree=1) == []

    def called(tokens: TokenState, x: torch.Tensor, options: dict) -> torch.Tensor:
        with full_attention(tokens):
            return through_options(x, options)

    def replaced(tokens: TokenState, x: torch.Tensor, options: dict) -> torch.Tensor:
        with full_attention(tokens, replaces=True):
            return without_options(x, options)

    def beside(tokens: TokenState, x: torch.Tensor, options: dict) -> torch.Tensor:
        with full_attention(tokens):
            pass
        return without_options(x, options)

    assert run_block(None, full=called) == run_block(None, full=replaced) == []
    with pytest.raises(RuntimeError, match="did not reach Raylight"):
        run_block(None, full=beside)


def test_a_module_with_gathered_tokens_needs_no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = OneBlock(), TokenState(0, 2)
    model.block.attention = without_options
    plan = SequencePlan("test.OneBlock", {"": {"x": Stream("x")}, "block": {"x": GatherAround("x")}}, {}, {})
    monkeypatch.setattr("raylight.parallel.hooks.all_gather", lambda value, *_: torch.cat([value, value], 1))
    SequenceHooks(model, plan, tokens)
    assert model(torch.randn(1, 6, 8), {}).shape == (1, 3, 8)
