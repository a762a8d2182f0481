"""Which models make room for others."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import comfy.model_management
import psutil
import pytest
import torch

from raylight.host.recipe import ModelRecipe
from raylight.worker.model_cache import CachedModel, ModelCache

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
    recipe = ModelRecipe(f"/models/{name}", "default", size, 0, "sharded")
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
