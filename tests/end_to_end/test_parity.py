"""Workers against one untouched ComfyUI process: same inputs, float32, on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comfy_cases import CASES, checkpoint, sample_on_workers, sample_stock

from raylight.cluster.config import SessionConfig
from raylight.host.recipe import SHARDED, WEIGHT_DTYPES, ModelRecipe, RayModel, WorkerConfig
from raylight.parallel.mesh import MeshShape

TOLERANCE = 1e-4
SMOKE = (
    "Wan T2V",
    "Wan T2V by yunchang",
    "Wan T2V, FSDP",
    "Flux, FSDP, offloaded, batch of 2",
    "Flux, regional prompts",
)
# The worker count changes slowest, so that all models share the workers of one count.
RUNS = [
    *(pytest.param(name, 2, marks=[pytest.mark.smoke] if name in SMOKE else []) for name in CASES),
    *(pytest.param(name, 3, marks=pytest.mark.slow) for name in CASES),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize(("name", "world"), RUNS)
def test_parity(name: str, world: int, folder: Path, report_parity, stock_results) -> None:
    case = CASES[name]
    path = checkpoint(folder, case)
    if name not in stock_results:
        stock_results[name] = sample_stock(path, case)
    expected = stock_results[name]
    workers = WorkerConfig(SessionConfig(MeshShape(ulysses=world), "cpu"), "TORCH_FLASH", strategy=case.strategy)
    actual = sample_on_workers(RayModel(workers, ModelRecipe.of(str(path), "default", case.sharding)), case)
    assert actual.shape == expected.shape
    assert expected.std() > 0.1
    error = ((actual - expected).abs().max() / expected.std()).item()
    report_parity(f"{name:<34} {world} workers   max error {error:.1e} of the standard deviation")
    assert error <= TOLERANCE


@pytest.fixture(scope="module")
def stock_results() -> dict:
    return {}


@pytest.mark.parametrize("weight_dtype", [dtype for dtype in WEIGHT_DTYPES if dtype != "default"])
def test_sharded_weights_equal_replicated_ones_in_every_dtype(weight_dtype: str, folder: Path) -> None:
    case = CASES["Wan T2V"]
    path = str(checkpoint(folder, case))
    workers = WorkerConfig(SessionConfig(MeshShape(ulysses=2), "cpu"), "TORCH")
    replicated = sample_on_workers(RayModel(workers, ModelRecipe.of(path, weight_dtype)), case)
    sharded = sample_on_workers(RayModel(workers, ModelRecipe.of(path, weight_dtype, SHARDED)), case)
    assert torch.equal(sharded, replicated)
    default = sample_on_workers(RayModel(workers, ModelRecipe.of(path, "default")), case)
    assert (replicated - default).std() > 1e-4 * default.std(), "the dtype changes nothing"
