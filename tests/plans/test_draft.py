"""Drafts of plans: as data and as text, what a proof allows, and rules that only drafts use."""

from __future__ import annotations

import gc
import json
import weakref
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from raylight.parallel import plan as rules
from raylight.parallel.hooks import SequenceHooks
from raylight.parallel.plan import Dropped, Gather, SelfAttention, SequencePlan, Stream
from raylight.parallel.sequence_parallel import SequenceGroup, SequenceParallel
from raylight.parallel.tokens import TokenState
from raylight.plans.draft.draft import Undrafted, drafts
from raylight.plans.draft.proof import difference, signature
from raylight.plans.draft.record import Record, block_lists, recording
from raylight.plans.draft.text import from_data, to_data, to_python

WIDTH = 8


class Joint(nn.Module):
    """A block that attends to two streams together, and returns both, or the image alone at the end."""

    def __init__(self, is_last: bool) -> None:
        super().__init__()
        self.linear, self.is_last = nn.Linear(WIDTH, WIDTH), is_last

    def forward(self, img: Tensor, txt: Tensor, pe: Tensor, attend: Any) -> Any:
        joint = attend(torch.cat([txt, img], 1) + pe)
        txt, img = self.linear(joint).split([txt.shape[1], img.shape[1]], 1)
        return img if self.is_last else (img, txt)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Joint(False), Joint(True)])

    def forward(self, img: Tensor, txt: Tensor, attend: Any) -> Tensor:
        pe = torch.arange(txt.shape[1] + img.shape[1]).view(1, -1, 1).expand(1, -1, WIDTH) * 0.1
        for block in self.blocks[:-1]:
            img, txt = block(img, txt, pe, attend)
        return self.blocks[-1](img, txt, pe, attend)


def heads_of(tokens: Tensor) -> Tensor:
    return tokens.view(*tokens.shape[:2], 2, WIDTH // 2).transpose(1, 2)


def plain(tokens: Tensor) -> Tensor:
    q = heads_of(tokens)
    return nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)


def recorded(model: Model) -> Record:
    with recording(model) as record:

        def attend(tokens: Tensor) -> Tensor:
            record.attended(heads_of(tokens), heads_of(tokens))
            return plain(tokens)

        model(torch.randn(1, 7, WIDTH), torch.randn(1, 3, WIDTH), attend)
    return record


def test_what_is_drafted() -> None:
    model = Model().requires_grad_(False)
    first, *others = drafts("models.Model", recorded(model))
    assert first.heads == 2
    assert first.inputs["blocks.*"]["img"] == Stream("blocks.img")
    assert first.inputs["blocks.*"]["pe"].streams == ("blocks.img", "blocks.txt")
    assert first.attention == {"blocks.*": SelfAttention(("blocks.img", "blocks.txt"))}
    assert first.outputs == {"blocks.1": (Gather("blocks.img"), Dropped("blocks.txt"))}
    # The order of the streams cannot be seen from outside.
    reverse = SelfAttention(("blocks.txt", "blocks.img"))
    assert any(plan.attention == {"blocks.*": reverse} and len(plan.outputs) == 1 for plan in others)
    assert any(len(plan.outputs) == 2 for plan in others)


@pytest.mark.parametrize(("weights", "expected"), [((), (3, 2, 2)), ((8, 1, 1), (5, 1, 1))])
@pytest.mark.parametrize("rank", range(3))
def test_a_rank_is_simulated_without_others(rank: int, weights: tuple[int, ...], expected: tuple[int, ...]) -> None:
    model, sizes = Model().requires_grad_(False), set()
    for plan in drafts("models.Model", recorded(model)):
        split = SequenceParallel(model, plan, SequenceGroup.simulated(rank, 3, weights), 2)

        def attend(tokens: Tensor, split: SequenceParallel = split) -> Tensor:
            q = heads_of(tokens)
            sizes.add(split.tokens.sizes("blocks.img"))
            # No kernel is called, as there is nothing that other ranks have sent.
            return split.attention(cast("Any", None), q, q, q, None, None).transpose(1, 2).flatten(2)

        try:
            assert model(torch.randn(1, 7, WIDTH), torch.randn(1, 3, WIDTH), attend).shape == (1, 7, WIDTH)
            assert not split.tokens.is_split
        finally:
            split.remove()
    assert sizes == {expected}


class Mixer(nn.Module):
    """A convolution over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.conv(tokens.movedim(1, 2)).movedim(2, 1)


class Mixed(nn.Module):
    """A block with several of them."""

    def __init__(self) -> None:
        super().__init__()
        self.mixers = nn.Sequential(*(Mixer() for _ in range(6)))

    def forward(self, img: Tensor, txt: Tensor, pe: Tensor, attend: Any) -> Tensor:
        return self.mixers(attend(img))


def test_rules_have_the_order_of_the_model() -> None:
    """Workers compare drafts as text."""
    model = Model()
    model.blocks = nn.ModuleList([Mixed()])
    model.requires_grad_(False)
    plan = drafts("models.Model", recorded(model))[0]
    assert list(plan.inputs) == ["blocks.0", *(f"blocks.0.mixers.{index}" for index in range(6))]


def test_a_model_without_attention_is_not_drafted() -> None:
    model = Model().requires_grad_(False)
    with recording(model) as record:
        model(torch.randn(1, 7, WIDTH), torch.randn(1, 3, WIDTH), plain)
    with pytest.raises(Undrafted, match="no block of it calls ComfyUI's attention"):
        drafts("models.Model", record)


def test_a_record_keeps_no_tensor_and_leaves_no_hook() -> None:
    model, seen = Model().requires_grad_(False), []
    model.blocks[0].linear.register_forward_hook(lambda _, __, output: seen.append(weakref.ref(output)))
    record = recorded(model)
    gc.collect()
    assert record.attention
    assert [one() for one in seen] == [None]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_lists_of_blocks() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleDict({"block0": nn.Sequential(nn.Linear(1, 1)), "block1": nn.Sequential(nn.Linear(1, 1))})
    model.norms = nn.ModuleList([nn.LayerNorm(1)])
    assert block_lists(model) == {"blocks.block*": ["blocks.block0", "blocks.block1"]}


ALL_RULES = SequencePlan(
    "models.Model",
    {
        "blocks.*": {
            "x": Stream("x", dim=0, grid=3),
            0: Stream("y", index=1),
            "pe": rules.Aligned(("x", "y"), expand=True),
            "ranges": rules.TokenRanges(("x",)),
            "index": rules.TokenIndex("x"),
        },
        "blocks.*.mixer": {"x": rules.GatherAround("x")},
        "blocks.*.cross": {"context": rules.Gathered("x", 2)},
    },
    {
        "blocks.*": (SelfAttention(("x", "y")), SelfAttention(("x",), calls=2)),
        "blocks.*.cross": rules.CrossAttention(("x",)),
        "blocks.*.other": rules.FullAttention(),
    },
    {"blocks.1": (Gather("x", index=0), Gather("x", index=2), Dropped("y"))},
    heads=4,
)


def test_plans_as_data_and_as_text() -> None:
    assert from_data(json.loads(json.dumps(to_data(ALL_RULES)))) == ALL_RULES
    assert eval(to_python(ALL_RULES), vars(rules)) == ALL_RULES  # noqa: S307


def test_rejects_data_that_is_no_plan() -> None:
    with pytest.raises(KeyError):
        from_data(to_data(ALL_RULES) | {"attention": [["blocks.*", {"rule": "Unknown"}]]})


def test_an_output_that_is_returned_twice_is_gathered_twice() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x + 1

    model = nn.Module()
    model.blocks, model.forward = nn.ModuleList([Twice()]), lambda x: model.blocks[0](x)
    plan = SequencePlan(
        "Twice",
        {"blocks.*": {"x": Stream("x")}},
        {},
        {"blocks.0": (Gather("x", index=0), Gather("x", index=1))},
        heads=2,
    )
    group = SequenceGroup.simulated(0, 2)
    hooks = SequenceHooks(model, plan, TokenState(0, 2, group.group))
    assert [tuple(one.shape) for one in model(torch.ones(1, 5, 1))] == [(1, 5, 1)] * 2
    hooks.remove()


def test_what_a_proof_allows() -> None:
    torch.manual_seed(0)
    whole = torch.randn(1, 4, 3, 32, 32)
    assert difference(whole, whole) == 0
    assert difference(whole, whole + 0.9e-4 * whole.std()) < 1 < difference(whole, whole + 1.1e-4 * whole.std())
    half = whole.bfloat16()
    noise = torch.randn_like(whole)
    assert difference(half, (half.float() * (1 + 5e-3 * noise)).bfloat16()) < 1
    assert difference(half, (half.float() * (1 + 2e-2 * noise)).bfloat16()) > 1
    assert difference(half.float(), (half.float() * (1 + 5e-3 * noise)), in_16_bits=True) < 1
    # One position of 3072: 0.4 % of the norm.
    border = half.clone()
    border[..., 1, 16, 3] *= 1.25
    assert ((border - half).float().norm() / half.float().norm()).item() < 1e-2
    assert difference(half, border) > 1
    assert difference([whole, half], [whole, border]) == difference(half, border)


@pytest.mark.parametrize("other", [torch.zeros(2, 3), torch.full((2, 2), float("nan")), torch.zeros(2, 2).half(), None])
def test_another_shape_or_dtype_or_nan_is_never_equal(other: Any) -> None:
    assert difference(torch.zeros(2, 2), other) == float("inf")


def test_a_signature_is_of_shapes_and_flags() -> None:
    inputs = {"x": torch.zeros(1, 2), "mask": None, "references": [torch.zeros(3)], "index": 4, "scale": 0.5}
    assert signature(inputs) == signature({**inputs, "x": torch.ones(1, 2), "scale": 0.7})
    for change in (
        {"x": torch.zeros(1, 3)},
        {"x": torch.zeros(1, 2).half()},
        {"mask": torch.zeros(1)},
        {"references": []},
        {"index": 5},
    ):
        assert signature(inputs) != signature({**inputs, **change})


def test_a_mask_without_effect_proves_nothing_of_others() -> None:
    mask = torch.ones(1, 6)
    padded = mask.clone()
    padded[:, 4:] = 0
    assert signature({"attention_mask": mask}) == signature({"attention_mask": torch.zeros(1, 6)})
    assert signature({"attention_mask": mask}) != signature({"attention_mask": padded})
    assert signature([mask.bool()]) != signature([padded.bool()])
    assert signature({"context": mask}) == signature({"context": padded})
