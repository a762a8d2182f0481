"""Which models make room for others."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import comfy.model_management
import psutil
import pytest
import torch

from raylight.host.jobs import NeedsBytes
from raylight.host.recipe import FileStamp, ModelRecipe
from raylight.worker import model_cache
from raylight.worker.model_cache import CachedModel, ModelCache
from raylight.worker.service import ModelService

GB = 10**9


@dataclass(eq=False)
class Machine:
    """Memory of a GPU and of its host, as models on it have it."""

    gpu: int
    host: int
    moved: list[str] = field(default_factory=list)


@dataclass(eq=False)
class Patcher:
    """What residents ask of a patcher."""

    name: str
    size: int
    machine: Machine
    on_gpu: bool = True

    def model_size(self) -> int:
        return self.size

    def loaded_size(self) -> int:
        return self.size if self.on_gpu else 0

    def get_free_memory(self, _: torch.device) -> int:
        return self.machine.gpu

    def detach(self) -> None:
        self.on_gpu = False
        self.machine.gpu += self.size
        self.machine.host -= self.size
        self.machine.moved.append(self.name)

    def is_clone(self, other: object) -> bool:
        return self is other


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(gpu=4 * GB, host=100 * GB)
    monkeypatch.setattr(comfy.model_management, "minimum_inference_memory", lambda: GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=machine.host, total=100 * GB))
    return machine


def resident(machine: Machine, name: str, size: int, on_gpu: bool = True) -> CachedModel:
    recipe = ModelRecipe(f"/models/{name}", "default", FileStamp(size), "sharded")
    return CachedModel(recipe, Patcher(name, size, machine, on_gpu), None, {}, {}, size)


def three(machine: Machine, device: str) -> tuple[ModelCache, list[CachedModel]]:
    models = ModelCache(torch.device(device), world_size=2)
    entries = [resident(machine, name, 6 * GB) for name in ("a", "b", "c")]
    for entry in entries:
        models.add(entry)
    models.get(entries[0].recipe)  # so that b is the least recently used
    return models, entries


def test_the_least_recently_used_go_to_the_cpu_until_the_model_fits(machine: Machine) -> None:
    models, _ = three(machine, "cuda")
    new = resident(machine, "d", 12 * GB, on_gpu=False)
    models.add(new)
    models.make_room_on_device(12 * GB, new)
    assert machine.moved == ["b", "c"]
    assert [model.recipe.name for model in models.all()] == ["b", "c", "a", "d"]


def test_room_for_a_model_that_is_yet_to_come(machine: Machine) -> None:
    models, _ = three(machine, "cuda")
    models.make_room_on_device(6 * GB)
    assert machine.moved == ["b"]


def test_what_fits_moves_nothing(machine: Machine) -> None:
    models, entries = three(machine, "cuda")
    models.make_room_on_device(0, entries[0])
    assert machine.moved == []


def test_without_host_memory_models_are_dropped_instead(machine: Machine) -> None:
    models, _ = three(machine, "cuda")
    machine.host = 12 * GB  # 10 % stay free
    new = resident(machine, "d", 6 * GB, on_gpu=False)
    models.add(new)
    models.make_room_on_device(6 * GB, new)
    assert "b" not in [model.recipe.name for model in models.all()]
    assert machine.moved == []


def test_a_new_model_on_a_full_host_drops_the_least_recently_used(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, _ = three(machine, "cpu")
    machine.host = 24 * GB
    drop = models.drop

    def drop_and_free(model: CachedModel) -> None:
        drop(model)
        machine.host += 2 * model.host_bytes

    monkeypatch.setattr(models, "drop", drop_and_free)
    models.make_room_on_host(10 * GB)
    assert [model.recipe.name for model in models.all()] == ["c", "a"]


def test_a_model_that_the_file_has_needs_no_room(machine: Machine) -> None:
    models, _ = three(machine, "cpu")
    machine.host = 0
    models.make_room_on_host(0)
    assert len(models.all()) == 3


@pytest.fixture
def alone(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The machine for one rank, without a process group."""
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda _: machine.gpu)
    monkeypatch.setattr(model_cache, "smallest", lambda value: value)
    return machine


def test_shortfall_counts_weights_sampling_and_what_can_be_moved(alone: Machine) -> None:
    models, (first, *_) = three(alone, "cuda")
    first.patcher.model = SimpleNamespace(memory_required=lambda shape: shape[0] * GB)
    fits = 1 * GB - 4 * GB - 12 * GB  # for sampling, less what is free and what the other two take
    assert models.shortfall(first.recipe) == fits
    assert models.shortfall(first.recipe, [(2,), (20,)]) == fits + 20 * GB
    new = resident(alone, "d", 60 * GB).recipe  # of which each of two ranks loads half
    assert models.shortfall(new) == 1 * GB + 30 * GB - 4 * GB - 18 * GB
    assert three(alone, "cpu")[0].shortfall(new) == 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_refuses_a_job_once_where_memory_is_short(device: str, alone: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    service = ModelService(SimpleNamespace(device=torch.device(device), world_size=2))
    done: list[str] = []
    held = SimpleNamespace(patched=lambda _: done.append("loaded"))
    monkeypatch.setattr(service, "_load", lambda *_: held)
    recipe = resident(alone, "d", 60 * GB).recipe
    expected = NeedsBytes(27 * GB) if device == "cuda" else None
    run = SimpleNamespace(enter=lambda _: None)
    assert service.load(run, recipe, may_refuse=True) == expected
    assert done == ([] if expected else ["loaded"])
    assert service.load(run, recipe, may_refuse=False) is None and done[-1] == "loaded"
