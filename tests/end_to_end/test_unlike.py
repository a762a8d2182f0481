"""Workers whose speeds or memory are given as unlike: what ComfyUI gives, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from comfy_cases import CASES, checkpoint, sample_on_workers, sample_stock

from raylight.cluster import active_session, memory_check, speed_check
from raylight.cluster.config import SessionConfig
from raylight.driver.status import overview
from raylight.driver.workers import ask_all
from raylight.host.recipe import REPLICATED, SHARDED, ModelRecipe, RayModel, WorkerConfig
from raylight.host.worker_service import WorkerService
from raylight.parallel.mesh import MeshShape

CASE = CASES["Wan T2V"]
ULYSSES = SessionConfig(MeshShape(ulysses=2), "cpu")
RING = SessionConfig(MeshShape(ring=2), "cpu")
BY_RUN = SessionConfig(MeshShape(ulysses=2), "cpu", by_run=True)


def model_of(path: Path, config: SessionConfig, sharding: str = REPLICATED) -> RayModel:
    return RayModel(WorkerConfig(config, "TORCH_FLASH"), ModelRecipe.of(str(path), "default", sharding))


def test_unlike_workers_equal_comfyui(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    path = checkpoint(tmp_path, CASE)
    expected = sample_stock(path, CASE)
    equal = sample_on_workers(model_of(path, ULYSSES), CASE)
    assert "by its speed" not in overview()
    for speeds, config, sharding in (("3,1", RING, REPLICATED), ("1,2", BY_RUN, REPLICATED), ("2,1", ULYSSES, SHARDED)):
        monkeypatch.setenv(speed_check.VARIABLE, speeds)  # the workers get them with the next mesh
        actual = sample_on_workers(model_of(path, config, sharding), CASE)
        assert ((actual - expected).abs().max() / expected.std()).item() <= 1e-4
        assert "Each gets tokens, heads and rows by its speed" in overview()
    monkeypatch.delenv(speed_check.VARIABLE)
    active_session.session(RING, None)
    assert "by its speed" not in overview()
    assert sample_on_workers(model_of(path, ULYSSES), CASE).equal(equal), "equal shares are what they were"


def test_weights_held_by_memory_equal_comfyui(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint(tmp_path, CASE)
    expected = sample_stock(path, CASE)
    equal = sample_on_workers(model_of(path, ULYSSES), CASE)
    gigabytes = path.stat().st_size / 1e9
    monkeypatch.setenv(memory_check.VARIABLE, f"{0.9 * gigabytes:.9f},{0.3 * gigabytes:.9f}")
    actual = sample_on_workers(model_of(path, RING, SHARDED), CASE)
    assert ((actual - expected).abs().max() / expected.std()).item() <= 1e-4
    assert "With FSDP each holds so much of the weights" in overview()
    memory = ask_all(active_session.running(), WorkerService.memory)
    first, second = (memory[rank].models[-1].device_bytes for rank in range(2))
    assert 3 < first / second < 4.2, "0.8 and 0.2 of what is sharded"
    monkeypatch.delenv(memory_check.VARIABLE)
    assert sample_on_workers(model_of(path, ULYSSES), CASE).equal(equal)
    assert "With FSDP" not in overview()
