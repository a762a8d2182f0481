"""What code of node packs changes between forwards that are sent one by one, and between two such runs."""

from __future__ import annotations

import gc
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy.model_management import unload_all_models
from comfy.model_patcher import ModelPatcher
from dropin_cases import equal_lengths, foreign_module, sample

from raylight.cluster.config import SessionConfig
from raylight.driver import api, forward_channel
from raylight.driver.forward_extras import Extras, SentExtras, sent_extras
from raylight.host.jobs import AS_SENT
from raylight.host.patcher_state import Change
from raylight.host.recipe import ModelRecipe, RayModel, WorkerConfig
from raylight.parallel.mesh import MeshShape

pytestmark = pytest.mark.usefixtures("as_comfyui_runs_nodes")

TOLERANCE = 1e-4
WORKERS = WorkerConfig(SessionConfig(MeshShape(ulysses=2), "cpu"), "TORCH_FLASH")


@pytest.fixture(scope="module")
def pack() -> Any:
    return foreign_module("each_step")


@pytest.fixture(scope="module")
def dropin(path: Path) -> ModelPatcher:
    return api.load(RayModel(WORKERS, ModelRecipe.of(str(path), "default")))


@pytest.mark.parametrize("name", ["other_objects", "same_tensor", "same_object", "attribute"])
def test_what_changes_in_each_step(
    name: str, pack: Any, stock: ModelPatcher, dropin: ModelPatcher, caplog: pytest.LogCaptureFixture
) -> None:
    make = getattr(pack, name)
    expected, _ = sample(equal_lengths(make(stock)))
    with caplog.at_level(logging.INFO, "raylight"):
        actual, _ = sample(equal_lengths(make(dropin)))
    assert "the sampling loop stays in ComfyUI" in caplog.text
    assert _error(actual, expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["kept_patch", "by_global"])
def test_what_changes_from_run_to_run(name: str, pack: Any, stock: ModelPatcher, dropin: ModelPatcher) -> None:
    make = getattr(pack, name)
    results = []
    for strength in (0.0, 0.9, 0.2):
        expected, _ = sample(equal_lengths(make(stock, strength)))
        actual, _ = sample(equal_lengths(make(dropin, strength)))
        assert _error(actual, expected) <= TOLERANCE
        results.append(expected)
    assert _error(results[1], results[2]) > 0.1


def test_what_is_put_into_the_model_goes_with_the_run(pack: Any, dropin: ModelPatcher) -> None:
    patch, model = pack.Kept(), dropin.clone()
    model.set_model_post_input_patch(patch)
    sample(equal_lengths(model), stays_here=True, steps=1)
    of_run = weakref.ref(patch)
    del model, patch
    gc.collect()
    assert of_run() is None
    kept = [weakref.ref(tensor) for tensor in forward_channel.current().sender._kept.values()]
    assert kept and all(tensor() is not None for tensor in kept)
    unload_all_models()
    gc.collect()
    assert not any(tensor() is not None for tensor in kept)
    sample(equal_lengths(dropin), stays_here=True, steps=1)


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.std()).item()


def _extras(options: dict[str, Any], changes: list[Change] | None = None) -> Extras:
    return Extras.of({"object_patches": {}}, options, changes or [])


def _patch(args: Any) -> Any:
    return args


def _sent(before: SentExtras | None, extras: Extras, stock: ModelPatcher, begins: bool = False) -> SentExtras:
    return sent_extras(before, extras, stock, begins)


def test_the_same_objects_are_sent_once(stock: ModelPatcher) -> None:
    options = {"patches": {"x": [_patch]}, "mine": {"at": {1: object}}, "sigma": torch.ones(1)}
    first = _sent(None, _extras(options), stock)
    again = _extras(dict(options))
    assert _sent(first, again, stock) is first
    assert first.others(again, stock) == ({"mine": AS_SENT}, [])
    assert _sent(first, again, stock, begins=True) is not first


@pytest.mark.parametrize("value", [torch.ones(3), torch.ones(()), torch.ones(3).numpy(), float("nan"), Path("a")])
def test_other_values_go_with_the_forward(value: Any, stock: ModelPatcher) -> None:
    options = {"patches": {"x": [_patch]}, "mine": {"value": 0, "code": _patch}}
    changes = [Change("diffusion_model", "mask", 0.0), Change("diffusion_model", "call", _patch)]
    first = _sent(None, _extras(options, changes), stock)
    options["mine"] = {"value": value, "code": _patch}
    changes[0] = Change("diffusion_model", "mask", torch.zeros(2))
    later = _extras(options, changes)
    assert _sent(first, later, stock) is first
    values, sent = first.others(later, stock)
    assert values["mine"]["value"] is value
    assert [one.value is AS_SENT for one in sent] == [False, True]


def test_code_that_is_made_anew_is_sent_anew(stock: ModelPatcher) -> None:
    def made(strength: float) -> Any:
        return lambda args: args * strength

    patch = made(0.5)
    first = _sent(None, _extras({"patches": {"x": [patch]}}), stock)
    assert _sent(first, _extras({"patches": {"x": [patch]}}), stock) is first
    assert _sent(first, _extras({"patches": {"x": [made(0.5)]}}), stock) is not first


def test_a_tensor_of_code_that_is_written_to(stock: ModelPatcher) -> None:
    table = torch.zeros(4)
    held: dict[str, Any] = {"patches": {"x": [lambda args: args * table]}}
    first = _sent(None, _extras(held), stock)
    assert _sent(first, _extras(held), stock) is first
    table.numpy()[2] = 1  # which PyTorch does not count
    assert _sent(first, _extras(held), stock) is not first
