"""The same weights under other names, alone and in a checkpoint with other models, are the same model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import comfy.model_management
import pytest
import torch
from comfy_cases import CASES, checkpoint, sample_on_workers
from diffusers_names import as_diffusers
from safetensors.torch import load_file, save_file

from raylight.cluster.config import SessionConfig
from raylight.driver import api
from raylight.host.recipe import REPLICATED, SHARDED, ModelRecipe, RayModel, WorkerConfig
from raylight.parallel.mesh import MeshShape

WORKERS = WorkerConfig(SessionConfig(MeshShape(ulysses=2), "cpu"), "TORCH")
CASE = CASES["Flux with guidance"]


def as_checkpoint(source: Path, target: Path) -> None:
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in load_file(source).items()}
    save_file(tensors | {"first_stage_model.decoder.conv_in.weight": torch.zeros(8, 8, 3, 3)}, target)


def as_pickle(source: Path, target: Path) -> None:
    torch.save(load_file(source), target)


def model_of(path: Path, sharding: str) -> RayModel:
    return RayModel(WORKERS, ModelRecipe.of(str(path), "default", sharding))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("forms"), CASE)


@pytest.fixture(scope="module")
def expected(source: Path) -> torch.Tensor:
    return sample_on_workers(model_of(source, REPLICATED), CASE)


@pytest.mark.parametrize("sharding", [REPLICATED, SHARDED])
@pytest.mark.parametrize(
    ("write", "name"),
    [(as_diffusers, "diffusers.safetensors"), (as_checkpoint, "checkpoint.safetensors"), (as_pickle, "model.pt")],
)
def test_forms(
    write: Callable[[Path, Path], None], name: str, sharding: str, source: Path, expected: torch.Tensor, tmp_path: Path
) -> None:
    write(source, tmp_path / name)
    assert torch.equal(sample_on_workers(model_of(tmp_path / name, sharding), CASE), expected)
    comfy.model_management.unload_all_models()


@pytest.mark.parametrize("sharding", [REPLICATED, SHARDED])
def test_rejects_a_file_that_lacks_one_of_the_joined(sharding: str, source: Path, tmp_path: Path) -> None:
    path = tmp_path / "lacking.safetensors"
    as_diffusers(source, path)
    tensors = load_file(path)
    del tensors["transformer_blocks.1.attn.to_k.weight"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"lacking\.safetensors .* double_blocks\.1\.img_attn\.qkv\.weight is joined"):
        api.load(model_of(path, sharding))
