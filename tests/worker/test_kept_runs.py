"""Runs of the product in which weights stay gathered, on workers without a GPU: against ComfyUI in one process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.torch_helpers import set_torch_compile_wrapper
from dropin_cases import SETUPS, equal_lengths, sample
from kept_service import KeptService
from loras import lora_for
from other_service import free_workers, gathers, kept, served_by
from safetensors.torch import load_file

from raylight.cluster import active_session
from raylight.cluster.config import SessionConfig
from raylight.cluster.errors import OUT_OF_MEMORY, WorkerError
from raylight.driver import api, short_of_memory
from raylight.host.recipe import OFFLOADED, SHARDED, ModelRecipe, RayModel, WorkerConfig
from raylight.parallel.graphs import AUTO, OFF, ON
from raylight.parallel.mesh import MeshShape

pytestmark = pytest.mark.usefixtures("as_comfyui_runs_nodes")

TOLERANCE = 1e-4
STEPS = 4
MESHES = {"Ulysses 2": MeshShape(ulysses=2), "CFG 2": MeshShape(batch=2)}

both_depths = pytest.mark.parametrize("depth", [False, True], ids=["whole run", "loop in ComfyUI"])


@pytest.fixture(scope="module", autouse=True)
def workers_that_keep() -> Iterator[None]:
    with served_by("kept_service:open_service"):
        yield


def recipe_of(path: Path, sharding: str) -> ModelRecipe:
    return ModelRecipe.of(str(path), "default", sharding)


def dropin(path: Path, sharding: str, mesh: MeshShape = MESHES["Ulysses 2"]) -> ModelPatcher:
    config = WorkerConfig(SessionConfig(mesh, "cpu"), "TORCH_FLASH")
    return api.load(RayModel(config, recipe_of(path, sharding)))


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return ((actual - expected).abs().max() / expected.std()).item() <= TOLERANCE


@both_depths
@pytest.mark.parametrize(("sharding", "mesh"), [(SHARDED, "Ulysses 2"), (OFFLOADED, "CFG 2")])
def test_equals_comfyui_and_gathers_once(
    sharding: str, mesh: str, depth: bool, path: Path, stock: ModelPatcher
) -> None:
    for set_up in (SETUPS["plain"], equal_lengths):
        expected = sample(set_up(stock), steps=STEPS)[0]
        model = dropin(path, sharding, MESHES[mesh])
        counts = [0]
        for _ in range(3):
            before = gathers()
            assert same(sample(set_up(model), stays_here=depth, steps=STEPS)[0], expected)
            counts.append(gathers() - before)
        assert counts[1] > 0 and counts[2:] == [0, 0]
        assert kept() > 0
        comfy.model_management.unload_all_models()
        free_workers()
        assert kept() == 0


@both_depths
def test_loras_in_turns(depth: bool, path: Path, stock: ModelPatcher) -> None:
    shapes = {f"diffusion_model.{key}": tuple(tensor.shape) for key, tensor in load_file(path).items()}
    tensors = lora_for(shapes, ["lora"], 1, size=0.06)

    def with_lora(model: ModelPatcher, strength: float) -> ModelPatcher:
        return comfy.sd.load_lora_for_models(model, None, dict(tensors), strength, 0)[0]

    model = dropin(path, SHARDED)
    for strength in (0.8, 0.0, 0.4, 0.8):
        expected = sample(SETUPS["plain"](with_lora(stock, strength) if strength else stock), steps=STEPS)[0]
        one = with_lora(model, strength) if strength else model
        assert same(sample(SETUPS["plain"](one), stays_here=depth, steps=STEPS)[0], expected), strength
    assert kept() > 0


def test_two_models_and_other_degrees(path: Path, stock: ModelPatcher) -> None:
    expected = sample(SETUPS["plain"](stock), steps=STEPS)[0]
    for sharding, mesh in ((SHARDED, "CFG 2"), (OFFLOADED, "CFG 2"), (SHARDED, "Ulysses 2"), (SHARDED, "CFG 2")):
        model = dropin(path, sharding, MESHES[mesh])
        assert same(sample(SETUPS["plain"](model), steps=STEPS)[0], expected)
        assert kept() > 0


def test_nothing_is_kept_after_memory_ran_out(path: Path, stock: ModelPatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_of_memory, "_short", set())
    expected = sample(SETUPS["plain"](stock), steps=STEPS)[0]
    free_workers()
    for ran_out in (False, True):
        if ran_out:
            with pytest.raises(WorkerError), short_of_memory.noted(recipe_of(path, SHARDED)):
                raise WorkerError("simulated", OUT_OF_MEMORY, spare_bytes=1)
        assert same(sample(SETUPS["plain"](dropin(path, SHARDED)), steps=STEPS)[0], expected)
        assert (kept() > 0) == (not ran_out)


@pytest.mark.parametrize(("sharding", "depth"), [(SHARDED, False), (OFFLOADED, True)], ids=["whole run", "one forward"])
def test_a_run_is_repeated_without_what_was_kept(
    sharding: str,
    depth: bool,
    path: Path,
    stock: ModelPatcher,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(short_of_memory, "_short", set())
    expected = sample(SETUPS["plain"](stock), steps=STEPS)[0]
    model = SETUPS["plain"](dropin(path, sharding))
    assert same(sample(model, stays_here=depth, steps=STEPS)[0], expected)
    assert kept() > 0
    active_session.running().run_all(KeptService.run_out, 2)
    caplog.clear()
    assert same(sample(model, stays_here=depth, steps=STEPS, looks=False)[0], expected)
    for _ in range(2):
        assert kept() == 0
        assert same(sample(model, stays_here=depth, steps=STEPS)[0], expected)
    assert caplog.text.count("workers do it again without these: rank 1") == 1


def test_a_run_whose_steps_were_looked_at_is_not_repeated(
    path: Path, stock: ModelPatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(short_of_memory, "_short", set())
    expected = sample(SETUPS["plain"](stock), steps=STEPS)[0]
    model = SETUPS["plain"](dropin(path, SHARDED))
    assert same(sample(model, steps=STEPS)[0], expected)
    active_session.running().run_all(KeptService.run_out, 2)
    with pytest.raises(WorkerError, match="ran out of memory") as error:
        sample(model, steps=STEPS)
    assert error.value.spare_bytes > 0
    assert same(sample(model, steps=STEPS)[0], expected)
    assert kept() == 0


def test_memory_that_is_short_all_the_same_is_not_noted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_of_memory, "_short", set())
    recipe = recipe_of(path, SHARDED)
    for spare_bytes, may_keep in ((0, True), (1, False), (0, True)):
        with pytest.raises(WorkerError), short_of_memory.noted(recipe):
            raise WorkerError("simulated", OUT_OF_MEMORY, spare_bytes)
        assert short_of_memory.may_keep(recipe) == may_keep
        assert short_of_memory.graphs_of(recipe, AUTO) == (AUTO if may_keep else OFF)
        assert short_of_memory.graphs_of(recipe, ON) == ON


def test_nothing_is_kept_in_a_compiled_run(path: Path, stock: ModelPatcher) -> None:
    expected = sample(equal_lengths(stock), steps=STEPS)[0]
    model = dropin(path, SHARDED, MESHES["CFG 2"])
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, backend="eager", dynamic=False)
    for one, keeps in ((model, True), (compiled, False), (model, True)):
        assert same(sample(equal_lengths(one), steps=STEPS)[0], expected)
        assert (kept() > 0) == keeps
