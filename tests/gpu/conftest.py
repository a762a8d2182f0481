"""Tests on real GPUs: skipped where PyTorch sees none, else run on all that it sees (CUDA_VISIBLE_DEVICES chooses)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import comfy.model_management
import comfy.sd
import gpu_cases
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from loras import lora_for
from safetensors.torch import load_file, save_file
from torch import Tensor

from raylight.driver import api

HERE = Path(__file__).parent
SKIP = pytest.mark.skip(reason="needs a GPU that PyTorch can use through CUDA, and sees none")

Compare = Callable[..., None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(SKIP)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def path(folder: Path) -> Path:
    return gpu_cases.wan(folder)


@pytest.fixture(scope="session")
def lora(folder: Path, path: Path) -> Path:
    """A LoRA file with adapters of two kinds for every matrix of the blocks."""
    shapes = {f"diffusion_model.{key}": tuple(tensor.shape) for key, tensor in load_file(path).items()}
    save_file(lora_for(shapes, ["lora", "lokr"], 1, size=0.06), folder / "lora.safetensors")
    return folder / "lora.safetensors"


@pytest.fixture(scope="session")
def stock(path: Path) -> ModelPatcher:
    return comfy.sd.load_diffusion_model(str(path))


@pytest.fixture(scope="session")
def expected(stock: ModelPatcher) -> Tensor:
    """What ComfyUI makes on one GPU, in this process."""
    with torch.inference_mode():
        return gpu_cases.latent(stock)


@pytest.fixture(scope="session", autouse=True)
def no_workers_after() -> Iterator[None]:
    yield
    api.end_workers(with_ray=True)


@pytest.fixture(autouse=True)
def as_comfyui_runs_nodes() -> Iterator[None]:
    """In inference mode; the next test finds workers without models."""
    with torch.inference_mode():
        yield
        comfy.model_management.unload_all_models()


@pytest.fixture
def compare(report_parity: Callable[[str], None], request: pytest.FixtureRequest) -> Compare:
    """Call it with what workers made, what ComfyUI made, and what that was: asserts that they are equal, but for
    rounding.
    """

    def assert_same(actual: Tensor, wanted: Tensor, what: str, largest: float = gpu_cases.HALF) -> None:
        found = gpu_cases.error(actual, wanted)
        report_parity(f"{gpu_cases.GPUS} GPUs  {request.node.name:<64} {what:<16} relative L2 {found:.1e}")
        assert found <= largest, what

    return assert_same
