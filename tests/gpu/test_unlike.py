"""Unlike shares of work and weights over NCCL: what ComfyUI gives, as graphs too; and the trial of GPUs of one kind."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
from comfy.model_patcher import ModelPatcher
from gpu_cases import GPUS, HEADS, latent, on_workers
from torch import Tensor

from raylight.cluster import active_session, memory_check, speed_check
from raylight.driver.status import overview
from raylight.driver.workers import ask_all
from raylight.host.recipe import REPLICATED, SHARDED
from raylight.host.worker_service import WorkerService
from raylight.parallel.graphs import OFF, ON
from raylight.parallel.mesh import MeshShape
from raylight.parallel.shares import ALIKE

pytestmark = pytest.mark.skipif(GPUS < 2, reason="one GPU shares nothing")
ULYSSES, RING = MeshShape(ulysses=max(1, GPUS)), MeshShape(ring=max(1, GPUS))
MOST_S = 3.0


def test_gpus_of_one_kind_are_alike_and_tried_in_no_time(path: Path) -> None:
    on_workers(path, REPLICATED)
    session = active_session.running()
    trial = speed_check.known(session.places)
    assert trial is not None and trial.is_complete
    assert speed_check.speeds_of(session.places) == ALIKE, f"GPUs of one kind that nothing else uses differ: {trial}"
    if (moments := session.times.session).get("speed") is not None:
        assert moments["speed"] - max(moments["links"], moments["prepared"]) < MOST_S


@pytest.mark.parametrize("sharding", [REPLICATED, SHARDED])
def test_unlike_shares_equal_comfyui(
    sharding: str, path: Path, expected: Tensor, compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    if HEADS < GPUS + 1:
        pytest.skip("every worker has one head")
    on_workers(path, sharding, mesh=ULYSSES)
    for mesh, speeds in ((RING, [3, *[1] * (GPUS - 1)]), (ULYSSES, [*[1] * (GPUS - 1), 2])):
        monkeypatch.setenv(speed_check.VARIABLE, ",".join(map(str, speeds)))  # known with the next mesh
        model = on_workers(path, sharding, mesh=mesh, graphs=ON)
        assert "by its speed" in overview()
        for turn in ("at first", "again", "as a graph"):
            compare(latent(model), expected, f"{mesh} {speeds}, {turn}")
    monkeypatch.delenv(speed_check.VARIABLE)
    on_workers(path, sharding, mesh=RING)
    assert "by its speed" not in overview()
    on_workers(path, sharding, mesh=ULYSSES)


def test_weights_held_by_memory_equal_comfyui(
    path: Path, lora: Path, stock: ModelPatcher, expected: Tensor, compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    gigabytes = path.stat().st_size / 1e9
    monkeypatch.setenv(
        memory_check.VARIABLE, ",".join(f"{part * gigabytes:.9f}" for part in (1.0, *[0.2] * (GPUS - 1)))
    )
    patched = comfy.sd.load_lora_for_models(stock, None, comfy.utils.load_torch_file(str(lora)), 0.8, 0)[0]
    with_lora = latent(patched)
    for graphs in (OFF, ON):
        model = on_workers(path, SHARDED, mesh=RING, graphs=graphs)
        assert "With FSDP each holds so much of the weights" in overview()
        for turn in ("at first", "again", "at last"):
            compare(latent(model), expected, f"{graphs}, {turn}")
        compare(latent(on_workers(path, SHARDED, (lora, 0.8), mesh=RING, graphs=graphs)), with_lora, f"{graphs}, LoRA")
        comfy.model_management.unload_all_models()
        compare(latent(model), expected, f"{graphs}, after it has left the GPU")
    memory = ask_all(active_session.running(), WorkerService.memory)
    first, *others = (memory[rank].models[-1].device_bytes for rank in range(GPUS))
    assert all(first > 3 * one for one in others)
    monkeypatch.delenv(memory_check.VARIABLE)
    on_workers(path, REPLICATED, mesh=ULYSSES)
    assert "With FSDP" not in overview()
