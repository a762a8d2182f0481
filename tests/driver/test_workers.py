"""Remedies for failures, by how the workers were set up, and memory that ComfyUI frees for workers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from raylight.cluster.config import SessionConfig
from raylight.cluster.errors import CRASHED, DIED, FAILED, HUNG, OUT_OF_MEMORY
from raylight.cluster.serialization import SerializedObject
from raylight.driver import memory, model_forward
from raylight.driver.forward_channel import FORWARD, ForwardChannel
from raylight.driver.workers import ask_with_room, remedies
from raylight.host.jobs import METHODS, NeedsBytes
from raylight.host.recipe import OFFLOADED, REPLICATED, SHARDED, FileStamp, ModelRecipe
from raylight.host.worker_service import WorkerService
from raylight.parallel.mesh import MeshShape


@pytest.mark.parametrize(
    ("kind", "sharding", "mesh", "with_", "without"),
    [
        (OUT_OF_MEMORY, REPLICATED, MeshShape(ulysses=2), "switch FSDP on", "FSDP_CPU_OFFLOAD"),
        (OUT_OF_MEMORY, REPLICATED, MeshShape(), "a smaller size", "switch FSDP on"),
        (OUT_OF_MEMORY, SHARDED, MeshShape(ulysses=2), "switch FSDP_CPU_OFFLOAD on", "switch FSDP on"),
        (OUT_OF_MEMORY, OFFLOADED, MeshShape(batch=2), "raise ulysses_degree", "switch FSDP"),
        (DIED, REPLICATED, MeshShape(ulysses=2), "the system's memory", "NCCL"),
        (CRASHED, SHARDED, MeshShape(ulysses=2), "another attention", "memory may be"),
        (HUNG, REPLICATED, MeshShape(ulysses=2), "NCCL_P2P_DISABLE=1", "FSDP"),
        (FAILED, None, MeshShape(ulysses=2), "restart", "FSDP"),
    ],
)
def test_remedies(kind: str, sharding: str | None, mesh: MeshShape, with_: str, without: str) -> None:
    text = remedies(SessionConfig(mesh, "cuda"), sharding, kind)
    assert with_ in text and without not in text


ANSWER = SerializedObject(b"", ())
RECIPE = ModelRecipe("/models/a.safetensors", "default", FileStamp(1))


class FakeSession:
    """Two ranks, of which one lacks `missing` bytes."""

    def __init__(self, device_type: str, missing: int) -> None:
        self.config = SimpleNamespace(is_local=True, device_type=device_type)
        self.missing = missing
        self.calls: list[tuple[Any, ...]] = []

    def run_all(self, verb: Any, job: Any, may_refuse: bool, **_: Any) -> dict[int, Any]:
        self.calls.append((verb, job, may_refuse))
        refuses = may_refuse and self.missing > 0
        return {rank: NeedsBytes(rank * self.missing) if refuses else f"{job} by {rank}" for rank in range(2)}


@pytest.mark.parametrize(
    ("device_type", "missing", "freed", "asked"),
    [
        ("cpu", 5, [], [False]),
        ("cuda", 0, [], [True]),
        ("cuda", 5, [0], [True, False]),  # what would be freed by asking again?
        ("cuda", 5, [1, 1], [True, True, False]),
        ("cuda", 5, [5], [True, True]),
    ],
)
def test_comfyui_frees_memory_only_where_workers_lack_it(
    device_type: str, missing: int, freed: list[int], asked: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = FakeSession(device_type, missing)
    frees = iter(freed)

    def make_room(_: Any, needs: dict[int, NeedsBytes]) -> bool:
        assert needs == {0: NeedsBytes(0), 1: NeedsBytes(session.missing)}
        found = next(frees)
        session.missing -= found
        return found > 0

    monkeypatch.setattr(memory, "make_room", make_room)
    assert ask_with_room(session, WorkerService.sample, "a job", RECIPE) == {0: "a job by 0", 1: "a job by 1"}
    assert session.calls == [(WorkerService.sample, "a job", may_refuse) for may_refuse in asked]
    assert next(frees, None) is None


def test_forwards_ask_for_memory_once_for_each_run_and_model(monkeypatch: pytest.MonkeyPatch) -> None:
    other = ModelRecipe("/models/b.safetensors", "default", FileStamp(1))
    session = FakeSession("cuda", 0)
    channel = ForwardChannel(session)
    has_used = False
    monkeypatch.setattr(memory, "others_were_used_since", lambda of: of is session and has_used)
    monkeypatch.setattr(session, "run_all", lambda *asked, **_: session.calls.append(asked) or {0: ANSWER})

    def may_be_refused(method: str, recipe: ModelRecipe = RECIPE, begins_run: bool = False) -> bool:
        job = SimpleNamespace(model=SimpleNamespace(recipe=recipe), method=method, begins_run=begins_run)
        model_forward._ask(channel, job)
        return session.calls[-1][-1]

    for _ in range(2):
        assert may_be_refused(METHODS[0], begins_run=True), "a text encoder was loaded before the run"
        assert not may_be_refused(METHODS[0])
        assert may_be_refused(FORWARD), "which takes more than the method"
        assert not any(map(may_be_refused, (FORWARD, METHODS[0], FORWARD)))
    assert may_be_refused(FORWARD, begins_run=True) and not may_be_refused(FORWARD)
    assert may_be_refused(FORWARD, other) and not may_be_refused(FORWARD, other)
    has_used = True
    assert may_be_refused(FORWARD, other)
