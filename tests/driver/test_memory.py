"""GPU memory that ComfyUI and a worker share: ComfyUI's own functions and models on a GPU whose sizes are made up.

The CPU by its number is used as a GPU. Sizes are in MiB.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import comfy.model_management
import comfy.ops
import pytest
import torch
from comfy.model_management import current_loaded_models, free_memory, load_models_gpu, unload_all_models
from comfy.model_patcher import ModelPatcher
from torch import nn

from raylight.cluster import object_store
from raylight.cluster.object_store import ObjectCache
from raylight.cluster.serialization import SerializedObject
from raylight.driver import memory
from raylight.driver.memory import WorkersOnGpu
from raylight.driver.remote_model import RemotePatcher, _prepare
from raylight.host.jobs import GivenBack, NeedsBytes
from raylight.host.worker_service import WorkerService

CPU, GPU = torch.device("cpu"), torch.device("cpu", 0)
MIB = 1 << 20
TOTAL = 4096


class Gpu:
    """A GPU with ComfyUI and the worker of rank 1. It is the session of that worker, too."""

    def __init__(self) -> None:
        self.held, self.cached, self.comfyui_cached, self.others = 100, 0, 0, 0
        self.asked: list[int] = []
        self.released = 0
        self.alive, self.busy = True, False
        self.shared = ObjectCache(8, MIB)

    @property
    def free(self) -> int:
        taken = sum(one.model_loaded_memory() for one in current_loaded_models if not isinstance(one, WorkersOnGpu))
        return (TOTAL - self.held - self.cached - self.comfyui_cached - self.others) * MIB - taken

    def get_free_memory(self, device: torch.device, torch_free_too: bool = False) -> object:
        assert device == GPU
        own = self.comfyui_cached * MIB
        return (self.free + own, own) if torch_free_too else self.free + own

    def empty_comfyui(self, force: bool = False) -> None:
        self.comfyui_cached = 0

    def leave_free(self, mib: float) -> None:
        self.others += int(self.free / MIB - mib)

    def run_all(self, verb: Any, wanted: dict[int, int]) -> dict[int, GivenBack]:
        assert verb is WorkerService.give_back and not self.busy and set(wanted) <= {1}
        freed = 0
        if 1 in wanted:
            if wanted[1]:
                self.asked.append(-(-wanted[1] // MIB))
            freed, self.cached = self.cached, 0
            part = min(self.held, max(0, -(-wanted[1] // MIB) - freed))
            self.held -= part
            freed += part
        return {0: GivenBack(0, 7 * MIB, "another GPU"), 1: GivenBack(freed * MIB, self.held * MIB, "this GPU")}

    def run(self, verb: Any) -> None:
        assert verb is WorkerService.free and not self.busy
        self.held = self.cached = 0
        self.released += 1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    gpu = Gpu()
    current_loaded_models.clear()
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: GPU)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", gpu.get_free_memory)
    monkeypatch.setattr(comfy.model_management, "soft_empty_cache", gpu.empty_comfyui)
    monkeypatch.setattr(comfy.model_management, "minimum_inference_memory", lambda: 0)
    monkeypatch.setattr(comfy.model_management, "extra_reserved_memory", lambda: 0)
    monkeypatch.setattr(memory, "gpu_identity", lambda _: "this GPU")
    monkeypatch.setattr(memory, "_workers", None)
    memory.register(gpu)
    yield gpu
    current_loaded_models.clear()
    gc.collect()


def model(mib: int) -> ModelPatcher:
    """A model of so many MiB in modules of one, and biases."""
    layers = [comfy.ops.manual_cast.Linear(512, 512, device=CPU, dtype=torch.float32) for _ in range(mib)]
    return ModelPatcher(nn.Sequential(*layers), GPU, CPU)


def loaded(*patchers: ModelPatcher) -> list[int]:
    return [round(patcher.loaded_size() / MIB) for patcher in patchers]


def test_a_text_encoder_asks_the_worker_for_what_is_missing(gpu: Gpu) -> None:
    encoder = model(40)
    gpu.leave_free(30)
    load_models_gpu([encoder])
    assert gpu.asked == [15]  # ComfyUI adds a tenth
    assert gpu.held == 85 and loaded(encoder) == [40]
    load_models_gpu([encoder])
    assert gpu.asked == [15]


def test_what_the_worker_does_not_use_is_given_back_before_weights(gpu: Gpu) -> None:
    encoder = model(40)
    gpu.cached = 20
    gpu.leave_free(30)
    memory.note_use(gpu)
    load_models_gpu([encoder])
    assert gpu.asked == [] and gpu.held == 100 and gpu.cached == 0


def test_models_used_before_the_workers_go_first(gpu: Gpu) -> None:
    encoder, decoder = model(40), model(20)
    load_models_gpu([encoder])
    memory.note_use(gpu)
    gpu.leave_free(2)
    load_models_gpu([decoder])
    assert gpu.asked == [] and gpu.held == 100
    assert loaded(decoder) == [20] and 15 <= loaded(encoder)[0] <= 20
    gpu.leave_free(0)
    missing = 50 - loaded(encoder)[0]  # it goes, and so does the decoder if the worker does not give the rest
    free_memory(50 * MIB, GPU)
    assert gpu.asked == [missing] and loaded(encoder, decoder) == [0, 20]


def test_the_workers_go_first_if_they_were_used_before(gpu: Gpu) -> None:
    encoder, other = model(40), model(60)
    memory.note_use(gpu)
    load_models_gpu([encoder])
    gpu.leave_free(1)
    load_models_gpu([other])
    assert gpu.asked == [65] and loaded(encoder, other) == [40, 60]


def test_workers_ask_comfyui_for_what_is_missing_of_what_was_used_before_them(gpu: Gpu) -> None:
    encoder, decoder = model(40), model(20)
    load_models_gpu([encoder])
    memory.note_use(gpu)
    load_models_gpu([decoder])
    gpu.leave_free(5)
    assert not memory.make_room(gpu, {0: NeedsBytes(10 * MIB), 1: NeedsBytes(0)})
    assert loaded(encoder, decoder) == [40, 20]
    assert memory.make_room(gpu, {0: NeedsBytes(99 * MIB), 1: NeedsBytes(10 * MIB)})
    assert 27 <= loaded(encoder)[0] <= 30 and loaded(decoder) == [20]
    assert 15 <= gpu.free / MIB <= 18
    left = loaded(encoder)[0]
    memory.make_room(gpu, {1: NeedsBytes((left + 50) * MIB, movable=50 * MIB)})
    assert loaded(encoder, decoder) == [0, 20], "the rank can move the rest away itself"
    gpu.leave_free(0)
    memory.make_room(gpu, {1: NeedsBytes(60 * MIB, movable=50 * MIB)})
    assert 7 <= loaded(decoder)[0] <= 10, "which was used after the workers, but they lack it"
    assert gpu.asked == [] and gpu.held == 100


def test_comfyui_gives_what_it_does_not_use_before_models(gpu: Gpu) -> None:
    encoder = model(40)
    load_models_gpu([encoder])
    memory.note_use(gpu)
    gpu.comfyui_cached = 30
    memory.make_room(gpu, {1: NeedsBytes(30 * MIB)})
    assert gpu.comfyui_cached == 0 and loaded(encoder) == [40]


def test_what_a_run_uses_in_comfyui_stays_until_it_ends(gpu: Gpu) -> None:
    encoder, control = model(40), model(20)
    remote = RemotePatcher(nn.Module(), GPU, CPU, size=1)
    load_models_gpu([encoder])

    def sample() -> None:
        _prepare(lambda *models: comfy.model_management.load_models_gpu(list(models)), remote, control)
        memory.note_use(gpu)

    with memory.run_in_comfyui():
        sample()
        gpu.leave_free(0)
        memory.make_room(gpu, {1: NeedsBytes(60 * MIB)})
        assert loaded(encoder, control) == [0, 20]
    sample()
    memory.make_room(gpu, {1: NeedsBytes(60 * MIB)})
    assert loaded(control) == [0]


def test_whether_comfyui_has_used_a_model_since_the_workers(gpu: Gpu) -> None:
    encoder = model(40)
    memory.note_use(gpu)
    assert not memory.others_were_used_since(gpu)
    load_models_gpu([encoder])
    assert memory.others_were_used_since(gpu) and not memory.others_were_used_since(Gpu())
    memory.note_use(gpu)
    assert not memory.others_were_used_since(gpu)


def test_unloading_all_releases_the_workers_models(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "put", lambda value: value)
    for _ in range(2):
        gpu.shared.of("patches", lambda: SerializedObject(b"", ()))
        unload_all_models()
        assert not gpu.shared._objects
        unload_all_models()
        assert gpu.held == 0
        gpu.held = 100
        memory.note_use(gpu)
    assert gpu.released == 2


@pytest.mark.parametrize("asking", [lambda: free_memory(TOTAL * MIB, GPU), unload_all_models])
def test_workers_in_a_run_are_not_waited_for(gpu: Gpu, asking: Any) -> None:
    gpu.busy = True
    asking()
    memory.note_use(gpu)
    asking()
    assert gpu.held == 100
    gpu.busy = False
    asking()
    assert gpu.held == 0


def test_workers_that_have_ended_are_forgotten(gpu: Gpu) -> None:
    gpu.alive = False
    free_memory(TOTAL * MIB, GPU)
    assert gpu.asked == [] and current_loaded_models == []
    successor = Gpu()
    memory.register(successor)
    memory.register(successor)
    assert [one.rank for one in current_loaded_models] == [1]


def test_an_error_of_the_workers_is_logged_only(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("rank 1 has fallen over")

    monkeypatch.setattr(gpu, "run_all", fail)
    encoder = model(40)
    gpu.leave_free(5)
    load_models_gpu([encoder])
    assert "rank 1 has fallen over" in caplog.text and loaded(encoder) == [40]


def test_a_run_on_the_workers_needs_no_room_in_comfyui(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfy.model_management, "minimum_inference_memory", lambda: 20 * MIB)
    encoder, control = model(40), model(10)
    load_models_gpu([encoder])
    remote = RemotePatcher(nn.Module(), GPU, CPU, size=1)
    memory.note_use(gpu)
    gpu.leave_free(0)
    _prepare(lambda *models: comfy.model_management.load_models_gpu(list(models), memory_required=5 * MIB), remote)
    assert loaded(encoder) == [40] and gpu.asked == []
    _prepare(lambda *models: comfy.model_management.load_models_gpu(list(models)), remote, control)
    assert 0 <= loaded(encoder)[0] <= 10 and gpu.asked == []


def test_each_gpu_that_comfyui_sees_and_a_worker_has(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["of nobody", "another GPU", "this GPU"]
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(memory, "gpu_identity", lambda device: names[device.index])
    monkeypatch.setattr(memory, "_workers", None)
    memory.register(Gpu())
    found = [(one.device.index, one.rank) for one in current_loaded_models if isinstance(one, WorkersOnGpu)]
    current_loaded_models.clear()
    assert found == [(0, None), (1, 0), (2, 1)]
