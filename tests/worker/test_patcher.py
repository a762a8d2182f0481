"""Weights are touched in one mode, whoever touches them.

The CPU by its number is used as a GPU: PyTorch copies what is moved there, into the same parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management
import pytest
import torch
from comfy_cases import CASES, checkpoint
from mode_cases import moved_in_inference_mode, patches_for

from raylight.dev.local_ranks import run_ranks, values
from raylight.host.checkpoint import MappedModel, load_mapped
from raylight.host.recipe import OFFLOADED, REPLICATED, SHARDED
from raylight.worker.patcher import mode_of
from raylight.worker.replicated_patcher import build_replicated
from raylight.worker.service import ModelService

CPU, GPU = torch.device("cpu"), torch.device("cpu", 0)
OTHERS = {"no mode": torch.enable_grad, "inference mode": torch.inference_mode}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("models"), CASES["Flux"])


@pytest.mark.parametrize("mode", OTHERS)
@pytest.mark.parametrize("patched", [False, True])
def test_replicated_weights_are_moved_and_used_after(mode: str, patched: bool, path: Path) -> None:
    with mode_of(REPLICATED):
        mapped = load_mapped(str(path), {})
        patcher, _ = build_replicated(mapped, CPU)
        before, here = result(mapped), places(mapped)
    patcher.load_device = GPU
    if patched:
        patcher = patcher.clone()
        patcher.add_patches(patches_for(mapped), 0.8)
    with OTHERS[mode]():
        loaded = comfy.model_management.LoadedModel(patcher)
        loaded.model_load()
    assert not places(mapped) & here
    with mode_of(REPLICATED):
        assert torch.equal(result(mapped), before) != patched
    with OTHERS[mode]():
        loaded.model_unload()
    with mode_of(REPLICATED):
        assert torch.equal(result(mapped), before)


@pytest.mark.parametrize("mode", OTHERS)
def test_replicated_weights_leave_in_part(mode: str, path: Path) -> None:
    with mode_of(REPLICATED):
        mapped = load_mapped(str(path), {})
        patcher, _ = build_replicated(mapped, CPU)
        before = result(mapped)
        patcher.load(GPU, full_load=True)
        there = places(mapped)
    with OTHERS[mode]():
        assert patcher.partially_unload(CPU, patcher.model_size() // 2) > 0
    assert there & places(mapped) and there - places(mapped)
    with OTHERS[mode]():
        patcher.load(GPU, full_load=True)  # ComfyUI casts weights of a model that is there in part
    with mode_of(REPLICATED):
        assert torch.allclose(result(mapped), before, atol=1e-5)


def test_sharded_weights_stay_out_of_inference_mode(path: Path) -> None:
    assert values(run_ranks(1, moved_in_inference_mode, path, timeout_s=120)) == [[0, 0]]


@pytest.mark.parametrize("sharding", [REPLICATED, SHARDED, OFFLOADED])
def test_all_of_a_job_is_done_in_the_mode_of_its_model(sharding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = SimpleNamespace(sharding=sharding, without_loras=None, loras=())
    job = SimpleNamespace(model=SimpleNamespace(recipe=recipe, patches=None), latent_shape=None)
    seen: list[tuple[bool, bool]] = []

    def hold(*_: object) -> None:
        seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        raise StopIteration

    monkeypatch.setattr(ModelService, "_load", hold)
    service = ModelService(SimpleNamespace(device=CPU, world_size=1, links=None))
    calls: list[Callable[[], object]] = [
        lambda: service.load(None, recipe),
        lambda: service.sample(None, (job,)),
        lambda: service.forward(None, job),
    ]
    for call in calls:
        for mode in OTHERS.values():
            with mode(), ends():
                call()
    assert seen == [(sharding == REPLICATED, False)] * len(calls) * len(OTHERS)


def test_free_memory_that_ranks_have_agreed_on_is_taken_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def smallest(value: int) -> int:
        asked.append(value)
        return value - 1

    monkeypatch.setattr("raylight.worker.patcher.smallest", smallest)
    patcher, _ = build_replicated(load_mapped(str(path), {}), CPU)
    patcher.agreed_free = 7
    assert patcher.get_free_memory(CPU) == 7 and not asked
    assert patcher.get_free_memory(CPU) == asked[0] - 1


@contextmanager
def ends() -> Iterator[None]:
    with pytest.raises(StopIteration):
        yield


def places(mapped: MappedModel) -> set[int]:
    return {weight.data_ptr() for weight in mapped.model.parameters()}


def result(mapped: MappedModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    latent, context = torch.randn(1, 16, 8, 6, generator=generator), torch.randn(1, 5, 160, generator=generator)
    return mapped.model.apply_model(
        latent, torch.tensor([0.7]), c_crossattn=context, y=torch.randn(1, 96, generator=generator)
    )
