"""One worker: attention goes to the kernel that was chosen, and the result is ComfyUI's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_cases import CASES, checkpoint, sample_on_workers, sample_stock

from raylight.attention.kernels import kernel
from raylight.cluster.config import SessionConfig
from raylight.dev.zoo.family import Draw
from raylight.dev.zoo.table import families
from raylight.driver import api
from raylight.host.patcher_state import OVERRIDE
from raylight.host.recipe import ModelRecipe, RayModel, WorkerConfig
from raylight.parallel.mesh import MeshShape
from raylight.plans import plan_for
from raylight.worker.forward_kinds import copied
from raylight.worker.one_worker import OneWorker

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
