"""Which models make room for others."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import psutil
import pytest
import torch
import unlike_machines

from raylight.dev.local_ranks import run_ranks, values
from raylight.host import machine_memory
from raylight.host.jobs import NeedsBytes
from raylight.host.recipe import FileStamp, ModelRecipe
from raylight.worker import cuda_graphs, model_cache, service
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
    kept_bytes: int = 0

    def release_kept(self) -> int:
        freed, self.kept_bytes = self.kept_bytes, 0
        self.machine.gpu += freed
        return freed

    def model_size(self) -> int:
        return self.size

    def loaded_size(self) -> int:
        return self.size if self.on_gpu else 0

    def detach(self) -> None:
        self.on_gpu = False
        self.machine.gpu += self.size
        self.machine.host -= self.size
        self.machine.moved.append(self.name)

    def is_clone(self, other: object) -> bool:
        return self is other


class Parallel:
    """What residents ask of a parallel model: whether it has graphs, and to drop them."""

    def __init__(self) -> None:
        self.has_graphs = False

    def drop_graphs(self) -> None:
        self.has_graphs = False


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(gpu=4 * GB, host=100 * GB)
    monkeypatch.setattr(comfy.model_management, "minimum_inference_memory", lambda: GB)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_: machine.gpu)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=machine.host, total=100 * GB))
    monkeypatch.setattr(machine_memory, "_CGROUP", "/none")
    return machine


def resident(machine: Machine, name: str, size: int, on_gpu: bool = True) -> CachedModel:
    recipe = ModelRecipe(f"/models/{name}", "default", FileStamp(size), "sharded")
    return CachedModel(recipe, Patcher(name, size, machine, on_gpu), Parallel(), {}, {}, size)


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
    models.make_room_on_device(new.recipe)
    assert machine.moved == ["b", "c"]
    assert [model.recipe.name for model in models.all()] == ["b", "c", "a", "d"]


def test_room_for_a_model_that_is_yet_to_come(machine: Machine) -> None:
    models, _ = three(machine, "cuda")
    models.make_room_on_device(resident(machine, "d", 12 * GB).recipe)  # of which each of two ranks loads half
    assert machine.moved == ["b"]


def test_what_fits_moves_nothing(machine: Machine) -> None:
    models, entries = three(machine, "cuda")
    entries[0].patcher.model = SimpleNamespace(memory_required=lambda shape: shape[0] * GB)
    models.make_room_on_device(entries[0].recipe, [(3,)])
    assert machine.moved == []


def test_without_host_memory_models_are_dropped_instead(machine: Machine) -> None:
    models, _ = three(machine, "cuda")
    machine.host = 12 * GB  # 10 % stay free
    new = resident(machine, "d", 6 * GB, on_gpu=False)
    models.add(new)
    models.make_room_on_device(new.recipe)
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


def test_the_host_is_as_full_as_its_container(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine_memory, "_CGROUP", str(tmp_path))
    (tmp_path / "memory.max").write_text(f"{40 * GB}\n")
    (tmp_path / "memory.current").write_text(f"{18 * GB}\n")
    (tmp_path / "memory.stat").write_text("active_file 0\ninactive_file 0\n")
    models, _ = three(machine, "cpu")
    models.make_room_on_host(9 * GB)  # on each of two ranks: of the 22 that are left 4 stay free
    assert len(models.all()) == 3
    models.make_room_on_host(10 * GB)
    assert models.all() == ()


def test_a_model_that_the_file_has_needs_no_room(machine: Machine) -> None:
    models, _ = three(machine, "cpu")
    machine.host = 0
    models.make_room_on_host(0)
    assert len(models.all()) == 3


def test_a_refusal_counts_weights_sampling_and_what_can_be_moved(machine: Machine) -> None:
    models, (first, *_) = three(machine, "cuda")
    first.patcher.model = SimpleNamespace(memory_required=lambda shape: shape[0] * GB)
    assert models.refusal(first.recipe) is None
    assert models.refusal(first.recipe, [(3,), (1,)]) is None
    assert models.refusal(first.recipe, [(2,), (20,)]) == NeedsBytes(17 * GB, movable=12 * GB)
    new = resident(machine, "d", 60 * GB).recipe  # of which each of two ranks loads half
    assert models.refusal(new) == NeedsBytes(27 * GB, movable=18 * GB)
    assert three(machine, "cpu")[0].refusal(new) is None


def test_a_rank_that_lacks_nothing_refuses_for_one_that_does(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_cache, "any_rank", lambda _: True)
    models, (first, *_) = three(machine, "cuda")
    assert models.refusal(first.recipe) == NeedsBytes(0, movable=12 * GB)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_refuses_a_job_once_where_memory_is_short(
    device: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raylight.worker.service.gpu_identity", lambda _: "")
    service = ModelService(SimpleNamespace(device=torch.device(device), world_size=2, links=None))
    done: list[str] = []
    held = SimpleNamespace(patched=lambda _: done.append("loaded"))
    monkeypatch.setattr(service, "_load", lambda *_: held)
    recipe = resident(machine, "d", 60 * GB).recipe
    expected = NeedsBytes(27 * GB) if device == "cuda" else None
    run = SimpleNamespace(enter=lambda _: None)
    assert service.load(run, recipe, may_refuse=True) == expected
    assert done == ([] if expected else ["loaded"])
    assert service.load(run, recipe, may_refuse=False) is None and done[-1] == "loaded"


def test_loading_asks_for_nothing_if_weights_stay_in_the_file(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raylight.worker.service.gpu_identity", lambda _: "")
    service = ModelService(SimpleNamespace(device=torch.device("cuda"), world_size=2, links=None))
    monkeypatch.setattr(service, "_load", lambda *_: SimpleNamespace(patched=lambda _: None))
    recipe = replace(resident(machine, "d", 60 * GB).recipe, sharding="replicated")
    assert service.load(SimpleNamespace(enter=lambda _: None), recipe, may_refuse=True) is None


@pytest.mark.parametrize("replays", [False, True])
def test_graphs_go_before_weights_unless_they_are_what_runs(
    replays: bool, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, entries = three(machine, "cuda")
    held = [2 * GB]

    def release(_: torch.device) -> int:
        freed, held[0] = held[0], 0
        return freed

    monkeypatch.setattr(cuda_graphs, "held_bytes", lambda _: held[0])
    monkeypatch.setattr(cuda_graphs, "release", release)
    shapes = [(1, 16, 8, 8)]
    entries[0].patcher.model = SimpleNamespace(memory_required=lambda _: 2 * GB)
    if replays:
        entries[0].parallel.has_graphs, entries[0].sampled = True, tuple(shapes)
    models.make_room_on_device(entries[0].recipe, shapes)  # 3 GB of the 4 that are free, with what graphs hold
    assert held == [2 * GB if replays else 0]
    assert machine.moved == []
    assert entries[0].sampled == tuple(shapes)


def keeping(machine: Machine, *nbytes: int) -> tuple[ModelCache, list[CachedModel]]:
    """`three` models that keep so many bytes of gathered weights."""
    models, entries = three(machine, "cuda")
    for entry, kept in zip(entries, nbytes, strict=True):
        entry.patcher.kept_bytes = kept
        machine.gpu -= kept
    return models, entries


def kept(models: ModelCache) -> int:
    return sum(model.patcher.kept_bytes for model in models.all())


def test_gathered_weights_go_before_others_and_only_if_memory_is_short(machine: Machine) -> None:
    machine.gpu = 12 * GB
    models, _ = keeping(machine, 3 * GB, 2 * GB, 0)
    for size, left, moved in ((10, 5 * GB, []), (16, 0, []), (26, 0, ["b"])):  # of which each of two ranks loads half
        models.make_room_on_device(resident(machine, "d", size * GB).recipe)
        assert kept(models) == left
        assert machine.moved == moved


def test_gathered_weights_are_no_reason_to_refuse(machine: Machine) -> None:
    machine.gpu = 12 * GB
    models, _ = keeping(machine, 3 * GB, 2 * GB, 0)
    assert models.refusal(resident(machine, "d", 10 * GB).recipe) is None
    assert kept(models) == 5 * GB
    assert models.refusal(resident(machine, "d", 18 * GB).recipe) is None
    assert kept(models) == 0
    assert models.refusal(resident(machine, "d", 26 * GB).recipe) == NeedsBytes(2 * GB, movable=18 * GB)


@pytest.mark.parametrize("wanted", [None, 0, GB, 4 * GB, 7 * GB])
def test_gathered_weights_are_given_back_first(
    wanted: int | None, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.gpu = 12 * GB
    models, _ = keeping(machine, 3 * GB, 2 * GB, 0)
    monkeypatch.setattr(comfy.model_management, "reset_cast_buffers", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 40 * GB - machine.gpu)
    freed = models.give_back(wanted)
    assert freed == {None: 0, 0: 0, GB: 5 * GB, 4 * GB: 5 * GB, 7 * GB: 11 * GB}[wanted]
    assert kept(models) == (0 if wanted else 5 * GB)
    assert machine.moved == (["b"] if wanted == 7 * GB else [])


@pytest.mark.parametrize(("beside", "free", "left"), [(True, 19, 0), (True, 21, 5 * GB), (False, 1, 5 * GB)])
def test_what_comfyui_has_left_on_its_gpu_after_a_run(
    beside: bool, free: int, left: int, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, _ = keeping(machine, 3 * GB, 2 * GB, 0)
    monkeypatch.setattr(comfy.model_management, "reset_cast_buffers", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free * GB, 100 * GB))
    models.leave_room(beside)
    assert kept(models) == left


def test_ranks_of_unlike_machines_drop_the_same_models() -> None:
    assert values(run_ranks(2, unlike_machines.left)) == [["a", "b"], ["a", "b"]]


def test_groups_do_runs_of_their_own_unless_weights_are_gathered_between_forwards() -> None:
    def may(sharding: str, **methods: Any) -> bool:
        patcher: Any = SimpleNamespace(model=SimpleNamespace(diffusion_model=SimpleNamespace(**methods)))
        parallel: Any = None
        recipe = ModelRecipe("a", "default", FileStamp(1), sharding)
        return service._may_divide_runs(CachedModel(recipe, patcher, parallel, {}, {}, 0))

    assert may("sharded")
    assert may("replicated", preprocess_text_embeds=len)
    assert not may("sharded", preprocess_text_embeds=len)
