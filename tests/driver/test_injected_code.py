"""Which code of nodes inside a model gets full tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfy.ldm.modules.attention import wrap_attn
from comfy.model_patcher import ModelPatcher

from raylight.cluster.config import ANY, SessionConfig
from raylight.dev.demo.tiny import write_checkpoint
from raylight.driver import injected_code, weightless
from raylight.driver.injected_code import inside_of, is_kernel
from raylight.host import foreign_code
from raylight.host.jobs import Inside
from raylight.host.patcher_state import Change
from raylight.host.recipe import ModelRecipe, WorkerConfig
from raylight.parallel.mesh import MeshShape

INNER = "diffusion_model."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("models") / "wan.safetensors"
    write_checkpoint(path, "wan-t2v", heads=3)
    return weightless.build(ModelRecipe.of(str(path), "default"), lambda *_: None)


def patched(model: Any, ring: int = 1, **patches: Any) -> ModelPatcher:
    patcher = ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    patcher.workers = WorkerConfig(SessionConfig(MeshShape(ulysses=2, ring=ring), "cpu"), "TORCH_FLASH")
    for name, value in patches.items():
        patcher.add_object_patch(INNER + name.replace("__", "."), value)
    return patcher


def theirs(*_: Any) -> None: ...


class Theirs(torch.nn.Module): ...


PLACES = {
    "blocks__0__forward": True,
    "blocks__1__self_attn__forward": True,
    "blocks__0__cross_attn__k__anything": False,
    "blocks__0__cross_attn__forward": True,
    "head__forward": True,
    "forward": True,
    "forward_orig": True,
    "blocks__0__ffn__forward": False,
    "blocks__0__norm1__forward": False,
    "patch_embedding__forward": False,
    "blocks__0__self_attn__norm_q__forward": False,
    "blocks__0__self_attn__q__forward": False,
    "text_embedding__forward": False,
}


@pytest.mark.parametrize("place", PLACES)
def test_code_at_a_place(place: str, model: Any) -> None:
    inside = inside_of(patched(model, **{place: theirs}), [])
    assert bool(inside.full_tokens_for) == PLACES[place]
    assert inside.watched == ()


def test_what_stands_beside_the_plan_is_watched(model: Any) -> None:
    inside = inside_of(patched(model, rope_embedder__forward=theirs, ref_conv=Theirs()), [])
    assert inside == Inside("", ("rope_embedder", "ref_conv"))


@pytest.mark.parametrize(
    "same",
    [
        lambda block: {"blocks__0__forward": block.forward},
        lambda block: {"blocks__0": block},
        lambda block: {"blocks__0__some_number": 3},
    ],
)
def test_the_models_own_code_is_none_of_a_node(same: Callable[[Any], dict[str, Any]], model: Any) -> None:
    assert inside_of(patched(model, **same(model.diffusion_model.blocks[0])), []) == Inside()


def test_another_module_at_a_block_gets_full_tokens(model: Any) -> None:
    assert "Theirs (at blocks.0)" in inside_of(patched(model, blocks__0=Theirs()), []).full_tokens_for


@pytest.mark.parametrize(
    ("change", "full"),
    [
        (Change("diffusion_model.blocks.0", "_forward_hooks", theirs), True),
        (Change("diffusion_model.blocks.0.ffn", "_forward_hooks", theirs), False),
        (Change("diffusion_model.blocks.0.self_attn", "num_heads", 3), False),
        (Change("diffusion_model", "forward_orig", theirs), True),
        (Change("", "extra_conds", theirs), False),
        (Change("python:comfy.ldm.wan.model", "repeat_e", theirs), True),
        (Change(Theirs, "forward", theirs), True),
    ],
)
def test_changes_of_the_model_itself(change: Change, full: bool, model: Any) -> None:
    assert bool(inside_of(patched(model), [change]).full_tokens_for) == full


@pytest.mark.parametrize(
    ("config", "full"),
    [
        (SessionConfig(MeshShape(ulysses=2), "cpu"), True),
        (SessionConfig(MeshShape(batch=2), "cpu"), False),
        (SessionConfig(MeshShape(), ANY, "host:6379", by_run=True, grows="ulysses"), True),
        (SessionConfig(MeshShape(), ANY, "host:6379", grows="batch"), False),
    ],
)
def test_code_in_a_model_without_a_plan(
    config: SessionConfig, full: bool, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_plan(*_: Any) -> None:
        raise ValueError("no plan")

    monkeypatch.setattr(injected_code, "plan_of", no_plan)
    patcher = patched(model, blocks__0__forward=theirs)
    patcher.workers = WorkerConfig(config, "TORCH_FLASH")
    assert bool(inside_of(patcher, []).full_tokens_for) == full


def test_an_override_and_a_ring(model: Any) -> None:
    for ring, full in ((1, False), (2, True)):
        patcher = patched(model, ring)
        patcher.model_options = {"transformer_options": {"optimized_attention_override": theirs}}
        assert bool(inside_of(patcher, []).full_tokens_for) == full


def sageattn(q: Any, k: Any, v: Any) -> Any:
    return q


def first_head(q: Any, k: Any, v: Any) -> Any:
    return q[..., :64]


@pytest.mark.parametrize(("attention", "kernel"), [(sageattn, True), (first_head, False)])
def test_an_override_behind_decorators(
    attention: Callable[..., Any], kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As packs write it: their attention function has ComfyUI's decorator, and what it calls has PyTorch's."""
    monkeypatch.setattr(foreign_code, "is_foreign_file", lambda path: path == __file__)
    library = torch.compiler.disable()(lambda *call: attention(*call))

    @wrap_attn
    def theirs_of_any_name(q: Any, k: Any, v: Any, heads: int, **kwargs: Any) -> Any:
        return library(q, k, v)

    def override(function: Any, *args: Any, **kwargs: Any) -> Any:
        return theirs_of_any_name.__wrapped__(*args, **kwargs)

    assert is_kernel(override) == kernel
    assert is_kernel(theirs_of_any_name) == kernel
