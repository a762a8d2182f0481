"""The same workers on one mesh after another: what ComfyUI gives, without a new start."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from comfy_cases import CASES, ParityCase, checkpoint, sample_on_workers, sample_stock
from loras import lora_for
from safetensors.torch import load_file, save_file

from raylight.cluster import active_session
from raylight.cluster.config import SessionConfig
from raylight.driver import api
from raylight.host.recipe import REPLICATED, SHARDED, LoraRecipe, ModelRecipe, RayModel, WorkerConfig
from raylight.parallel.mesh import MeshShape

CASE = CASES["Wan T2V"]
ULYSSES, BATCH, RING = MeshShape(ulysses=2), MeshShape(batch=2), MeshShape(ring=2)
MOST_S = 20.0  # usually 0.1; this machine may be busy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def model_of(path: Path, mesh: MeshShape, sharding: str = REPLICATED, *loras: LoraRecipe) -> RayModel:
    recipe = ModelRecipe.of(str(path), "default", sharding, loras)
    return RayModel(WorkerConfig(SessionConfig(mesh, "cpu"), "TORCH_FLASH"), recipe)


def assert_equals(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert ((actual - expected).abs().max() / expected.std()).item() <= 1e-4


def arranged(mesh: MeshShape) -> float:
    """Arrange the workers in a mesh; return the seconds that it took."""
    began = time.monotonic()
    active_session.session(SessionConfig(mesh, "cpu"), None)
    return time.monotonic() - began


@pytest.mark.parametrize("sharding", [REPLICATED, SHARDED])
def test_equals_comfyui_on_each_mesh_with_the_same_workers(sharding: str, folder: Path) -> None:
    path = checkpoint(folder, CASE)
    lora = folder / "lora.safetensors"
    shapes = {f"diffusion_model.{key}": tuple(tensor.shape) for key, tensor in load_file(path).items()}
    save_file(lora_for(shapes, ["lora"], 1), lora)
    loras = (LoraRecipe.of(str(lora), 0.7),)
    expected = sample_stock(path, CASE, loras=[(lora, 0.7)])
    assert_equals(sample_on_workers(model_of(path, ULYSSES, sharding, *loras), CASE), expected)
    session = active_session.running()
    places = dict(session.places)
    for mesh in (BATCH, RING, ULYSSES, BATCH):
        assert arranged(mesh) < MOST_S
        assert_equals(sample_on_workers(model_of(path, mesh, sharding, *loras), CASE), expected)
        assert active_session.running() is session and session.places == places
        assert session.config.mesh == mesh


@pytest.mark.parametrize("sharding", [REPLICATED, SHARDED])
def test_a_model_that_a_mesh_cannot_split_is_refused_there_alone(sharding: str, folder: Path) -> None:
    one_head, other = ParityCase("wan-t2v", (1, 16, 3, 10, 14), 4096, heads=1), CASES["Flux"]
    path = checkpoint(folder, one_head)
    expected, others = sample_stock(path, one_head), sample_stock(checkpoint(folder, other), other)
    assert_equals(sample_on_workers(model_of(path, BATCH, sharding), one_head), expected)
    places = dict(active_session.running().places)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^WanModel has 1 attention heads, too few for ulysses_degree = 2"):
            api.load(model_of(path, ULYSSES, sharding))
        assert_equals(sample_on_workers(model_of(checkpoint(folder, other), ULYSSES), other), others)
    assert_equals(sample_on_workers(model_of(path, RING, sharding), one_head), expected)
    assert_equals(sample_on_workers(model_of(path, BATCH, sharding), one_head), expected)
    assert active_session.running().places == places
