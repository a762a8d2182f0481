"""Changes of nodes to a model itself are found; what ComfyUI does to it is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.sd
import pytest
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher

from raylight.dev.demo.tiny import write_checkpoint
from raylight.driver import weightless, written_weights
from raylight.host.recipe import ModelRecipe


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "wan.safetensors"
    write_checkpoint(path, "wan-t2v", heads=3)
    return path


@pytest.fixture
def base(path: Path) -> BaseModel:
    return weightless.build(ModelRecipe.of(str(path), "default"), lambda *_: None)


@pytest.fixture(scope="module")
def stock(path: Path) -> ModelPatcher:
    return comfy.sd.load_diffusion_model(str(path))


def block(model: Any) -> Any:
    return model.diffusion_model.blocks[1]


class Other(torch.nn.Identity):
    pass


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "method": (lambda m: setattr(block(m), "forward", lambda *_: 1), "diffusion_model.blocks.1.forward"),
    "method of the model": (
        lambda m: setattr(m.diffusion_model, "forward_orig", print),
        "diffusion_model.forward_orig",
    ),
    "method of its base": (lambda m: setattr(m, "extra_conds", lambda **_: {}), "extra_conds"),
    "attribute": (
        lambda m: setattr(block(m).self_attn, "num_heads", 1),
        "diffusion_model.blocks.1.self_attn.num_heads",
    ),
    "new attribute": (lambda m: setattr(m.diffusion_model, "their_state", 3), "diffusion_model.their_state"),
    "class": (
        lambda m: setattr(block(m), "__class__", type("Theirs", (type(block(m)),), {})),
        "diffusion_model.blocks.1.__class__",
    ),
    "hook": (lambda m: block(m).register_forward_hook(print), "diffusion_model.blocks.1._forward_hooks"),
    "hook before": (
        lambda m: block(m).register_forward_pre_hook(print, with_kwargs=True),
        "diffusion_model.blocks.1._forward_pre_hooks",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_finds_a_change_on_either_model(name: str, base: BaseModel, path: Path) -> None:
    change, place = CHANGES[name]
    built = weightless.baseline_of(base)
    other = comfy.sd.load_diffusion_model(str(path)).model
    for model in (base, other):
        assert built.changes(model) == []
        change(model)
        assert [found.place for found in built.changes(model)] == [place]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.diffusion_model.blocks.__setitem__(1, Other()), "diffusion_model.blocks.1 was replaced|removed"),
        (lambda m: m.diffusion_model.add_module("theirs", Other()), "diffusion_model.theirs was added"),
        (lambda m: delattr(m.diffusion_model, "head"), "diffusion_model.head was removed"),
    ],
)
def test_rejects_another_part(change: Callable[[Any], Any], message: str, base: BaseModel) -> None:
    change(base)
    with pytest.raises(ValueError, match=message):
        weightless.baseline_of(base).changes(base)


def test_object_patches_are_no_change(base: BaseModel) -> None:
    patcher = ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))
    patcher.add_object_patch("diffusion_model.blocks.0.forward", print)
    patcher.add_object_patch("diffusion_model.blocks.1", Other())
    patcher.patch_model(load_weights=False)
    assert weightless.baseline_of(base).changes(base, patcher.object_patches) == []
    patcher.unpatch_model(unpatch_weights=False)
    assert weightless.baseline_of(base).changes(base) == []


def test_what_comfyui_does_to_a_model_is_no_change(base: BaseModel, stock: ModelPatcher) -> None:
    with torch.inference_mode():
        other = stock.clone()
        other.add_patches({"diffusion_model.head.head.weight": ("diff", (torch.ones(64, 384),))}, 0.5)
        other.patch_model(torch.device("cpu"))
        assert weightless.baseline_of(base).changes(stock.model) == []
        other.unpatch_model(torch.device("cpu"))
    assert weightless.baseline_of(base).changes(stock.model) == []


WEIGHT = "diffusion_model.head.head.weight"


@pytest.mark.parametrize(
    "write",
    [
        lambda head: head.weight.mul_(2),
        lambda head: head.weight.data.mul_(2),
        lambda head: setattr(head, "weight", torch.nn.Parameter(head.weight.detach() * 2, requires_grad=False)),
    ],
)
def test_finds_a_weight_that_was_written_to(write: Callable[[Any], Any], base: BaseModel, path: Path) -> None:
    recipe = ModelRecipe.of(str(path), "default")
    before = base.diffusion_model.head.head.weight.clone()
    with torch.inference_mode():  # as ComfyUI runs nodes
        written_weights.look(base, recipe)
        assert written_weights.of(base) == ({}, "")
        write(base.diffusion_model.head.head)
        written_weights.look(base, recipe)
    found, content = written_weights.of(base)
    assert list(found) == [WEIGHT]
    assert torch.equal(found[WEIGHT], before * 2)
    with torch.inference_mode():
        base.diffusion_model.head.head.weight.data.mul_(3)
        written_weights.look(base, recipe)
    found, again = written_weights.of(base)
    assert torch.equal(found[WEIGHT], before * 6) and again != content, "the same weight, written to once more"
    other = weightless.build(recipe, lambda *_: None)
    assert torch.equal(other.diffusion_model.head.head.weight, before), "a loader gives a model as its file has it"
    written_weights.look(other, recipe)
    assert written_weights.of(other) == ({}, "")


def test_rejects_a_weight_of_another_shape(base: BaseModel, path: Path) -> None:
    base.diffusion_model.head.head.weight = torch.nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    with pytest.raises(ValueError, match="changed the weight head.head.weight of wan.safetensors .*Parallelize Model"):
        written_weights.look(base, ModelRecipe.of(str(path), "default"))


def test_models_of_one_file_share_nothing_that_nodes_change(base: BaseModel, path: Path) -> None:
    other = weightless.build(ModelRecipe.of(str(path), "default"), lambda *_: None)
    base.current_patcher = ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))
    for change, _ in CHANGES.values():
        change(base)
    assert other.current_patcher is None
    assert weightless.baseline_of(other).changes(other) == []


def test_computes_with_its_weights_on_any_input(base: BaseModel, stock: ModelPatcher) -> None:
    inputs = torch.ones(1, 4, 4096)
    with torch.inference_mode():
        expected = stock.model.diffusion_model.text_embedding(inputs)
        assert torch.equal(base.diffusion_model.text_embedding(inputs), expected)
