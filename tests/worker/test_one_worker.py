"""One worker: attention goes to the kernel that was chosen, and the result is ComfyUI's."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfy_cases import CASES, checkpoint, sample_on_workers, sample_stock

from raylight.attention.kernels import kernel
from raylight.cluster.config import SessionConfig
from raylight.cluster.diagnosis import Failure
from raylight.cluster.errors import HUNG
from raylight.cluster.status import Report, Status
from raylight.cluster.watchdog import Watchdog
from raylight.dev.zoo.family import Draw
from raylight.dev.zoo.table import families
from raylight.driver import api
from raylight.host.patcher_state import OVERRIDE
from raylight.host.recipe import ModelRecipe, RayModel, WorkerConfig
from raylight.parallel import heartbeat
from raylight.parallel.mesh import MeshShape
from raylight.plans import plan_for
from raylight.worker import block_signs
from raylight.worker.forward_kinds import copied
from raylight.worker.one_worker import OneWorker
from raylight.worker.parallel_model import ParallelModel

TOLERANCE = 1e-4


class Counting:
    """A kernel that counts its calls."""

    def __init__(self) -> None:
        self.calls, self._kernel = 0, kernel("TORCH")

    def __call__(self, *tensors: Any) -> torch.Tensor:
        self.calls += 1
        return self._kernel(*tensors)


@pytest.mark.parametrize("name", families())
@torch.inference_mode()
def test_every_family_equals_comfyui(name: str) -> None:
    family = families()[name]
    model, make = family.build(), next(iter(family.calls.values()))
    inputs = make(Draw(3))
    options = inputs.pop("transformer_options", {})
    expected = model.apply_model(**copied(inputs), transformer_options=dict(options))
    counting, routed = Counting(), {"transformer_options": dict(options)}
    one = OneWorker(model.diffusion_model, plan_for(model.diffusion_model))
    try:
        one.install(routed, counting)
        actual = model.apply_model(**copied(inputs), transformer_options=routed["transformer_options"])
        made = counting.calls
    finally:
        one.remove()
    assert made > 0
    assert ((actual - expected).abs().max() / expected.std()).item() <= TOLERANCE
    model.apply_model(**copied(inputs), transformer_options=dict(options))
    assert counting.calls == made, "without its options the model has ComfyUI's attention again"


def test_an_override_of_a_node_stays() -> None:
    family = families()["Flux Dev"]
    model = family.build().diffusion_model
    given = {"transformer_options": {OVERRIDE: print}}
    OneWorker(model, plan_for(model)).install(given, Counting())
    assert given["transformer_options"][OVERRIDE] is print


class Mark:
    """What a GPU reaches when it has come to some block."""

    def __init__(self) -> None:
        self.reached = False

    def query(self) -> bool:
        return self.reached


@pytest.mark.parametrize("other", [False, True])
@torch.inference_mode()
def test_a_gpu_that_computes_one_step_for_long_makes_progress(other: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    marks: list[Mark] = []

    def mark_on(_: torch.device) -> Mark:
        marks.append(Mark())
        return marks[-1]

    monkeypatch.setattr(heartbeat, "_mark_on", mark_on)
    monkeypatch.setattr(block_signs, "_EACH", 2)  # this model has few
    family = families()["Flux Dev"]
    model = family.build()
    one_rank: Any = SimpleNamespace(size=lambda: 1)
    parallel = ParallelModel(model, one_rank, torch.device("cpu"))
    before = heartbeat.beats()
    model.apply_model(**next(iter(family.calls.values()))(Draw(3)))  # the host has launched all of it
    assert heartbeat.beats() == before, "ranks are compared by beats, and may divide a forward unlike"
    watchdog, status = Watchdog(SessionConfig(MeshShape(), "cpu", stall_timeout_s=0.2), print), Status()
    watchdog._actors = (None,) * (1 + other)
    for rank in range(1, 1 + other):
        watchdog._receive(rank, Report("step 1 of 1", 10**9, 0, ()))
    watchdog._receive(0, status.report(0))
    assert len(marks) >= 2
    for mark in marks:
        time.sleep(0.15)
        mark.reached = True
        watchdog._receive(0, status.report(0))
        assert watchdog._stalled() is None
    time.sleep(0.3)
    watchdog._receive(0, status.report(0))
    waiting = "; the other ranks are waiting for it" if other else ""
    assert watchdog._stalled() == Failure(HUNG, 0, f"no progress for 0.2 s{waiting}")
    parallel.remove()
    assert not any(module._forward_pre_hooks for module in model.diffusion_model.modules())


def config(attention: str) -> WorkerConfig:
    return WorkerConfig(SessionConfig(MeshShape(), "cpu"), attention)


@pytest.mark.parametrize("attention", ["auto", "TORCH_FLASH"])
def test_a_worker_equals_comfyui(attention: str, tmp_path: Path) -> None:
    case = CASES["Wan T2V"]
    path = checkpoint(tmp_path, case)
    actual = sample_on_workers(RayModel(config(attention), ModelRecipe.of(str(path), "default")), case)
    expected = sample_stock(path, case)
    assert ((actual - expected).abs().max() / expected.std()).item() <= TOLERANCE


def test_rejects_a_kernel_that_is_not_installed(tmp_path: Path) -> None:
    case = CASES["Flux"]
    model = RayModel(config("FA3"), ModelRecipe.of(str(checkpoint(tmp_path, case)), "default"))
    with torch.inference_mode(), pytest.raises(ValueError, match="XFuser_attention = FA3: .* is not installed"):
        sample_on_workers(model, case)
    again = RayModel(config("auto"), model.recipe)
    assert api.load(again) is not None, "the worker stays"
