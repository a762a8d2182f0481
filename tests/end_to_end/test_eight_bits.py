"""Runs whose exchange is in 8 bits, as the user has chosen: close to ComfyUI's result, with the error told in each."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_cases import CASES, checkpoint
from comfy_cases import sample as sample_case
from dropin_cases import equal_lengths, sample

from raylight.cluster.config import SessionConfig
from raylight.driver import api
from raylight.host.recipe import REPLICATED, SHARDED, ModelRecipe, RayModel, WorkerConfig
from raylight.parallel.external_strategies import OURS, OURS_INT8
from raylight.parallel.mesh import MeshShape

pytestmark = pytest.mark.usefixtures("as_comfyui_runs_nodes")

EXACT, CLOSE = 1e-4, 5e-2
TOLD = re.compile(
    r"exchange: in 8 bits, which changed what attention gets by (0\.\d\d)% \(at most \d\.\d\d%\), and its result by "
    r"(\d\.\d\d)% \(at most \d\.\d\d%\), relative L2 in (\d+) attention calls of the first forward"
)
CFG = MeshShape(batch=2)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("models"), CASES["Flux with guidance"])


@pytest.fixture(scope="module")
def expected(path: Path) -> torch.Tensor:
    return sample(equal_lengths(comfy.sd.load_diffusion_model(str(path))), steps=2)[0]


def on_workers(
    path: Path, strategy: str, mesh: MeshShape, by_run: bool = False, sharding: str = REPLICATED
) -> ModelPatcher:
    workers = WorkerConfig(SessionConfig(mesh, "cpu", by_run=by_run), "TORCH_FLASH", False, strategy, sharding)
    return api.load(RayModel(workers, ModelRecipe.of(str(path), "default", sharding)))


def error_of(
    path: Path,
    expected: torch.Tensor,
    strategy: str,
    mesh: MeshShape = MeshShape(ulysses=2),  # noqa: B008
    stays_here: bool = False,
    **options: Any,
) -> float:
    """Return the largest error of a run on two workers, in standard deviations."""
    model = on_workers(path, strategy, mesh, **options)
    actual, _ = sample(equal_lengths(model), steps=2, stays_here=stays_here)
    return ((actual - expected).abs().max() / expected.std()).item()


def exchanges(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for message in caplog.messages if message.startswith("exchange: ")]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stays_here": True},
        {"sharding": SHARDED},
        {"mesh": MeshShape(ring=2)},
        {"mesh": MeshShape(ring=2), "by_run": True},
    ],
)
def test_the_result_is_close_and_the_error_is_told(
    options: dict[str, Any], path: Path, expected: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "raylight"):
        for turn in range(2):
            assert EXACT < error_of(path, expected, OURS_INT8, **options) < CLOSE
            assert len(exchanges(caplog)) == turn + 1
    for told in exchanges(caplog):
        found = TOLD.fullmatch(told)
        assert found, told
        assert 0.2 < float(found[1]) < 1 and 0.1 < float(found[2]) < 3 and int(found[3]) >= 2


def test_no_other_run_is_in_8_bits(path: Path, expected: torch.Tensor, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "raylight"):
        error_of(path, expected, OURS_INT8)
        caplog.clear()
        assert error_of(path, expected, OURS) < EXACT
    assert not exchanges(caplog)


@pytest.mark.parametrize("mesh", [CFG, MeshShape()], ids=["rows", "one worker"])
def test_a_run_that_exchanges_nothing_says_so(
    mesh: MeshShape, path: Path, expected: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "raylight"):
        assert error_of(path, expected, OURS_INT8, mesh=mesh) < EXACT
    (told,) = exchanges(caplog)
    assert "its error was not measured, as this run's first forward has split none" in told


@pytest.mark.slow
def test_a_compiled_model_is_not_measured(path: Path, expected: torch.Tensor, caplog: pytest.LogCaptureFixture) -> None:
    model = on_workers(path, OURS_INT8, MeshShape(ulysses=2)).clone()
    set_torch_compile_wrapper(model, backend="eager", dynamic=False)
    with caplog.at_level(logging.INFO, "raylight"):
        actual, _ = sample(equal_lengths(model), steps=2)
    assert EXACT < ((actual - expected).abs().max() / expected.std()).item() < CLOSE
    (told,) = exchanges(caplog)
    assert told.endswith("or is compiled")


def test_tokens_of_all_workers_are_in_8_bits_where_rows_do_not_divide(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stock = comfy.sd.load_diffusion_model(str(path))
    one_by_one = CASES["Flux with guidance"]
    expected = sample_case(stock, one_by_one, 2, 42)
    with caplog.at_level(logging.INFO, "raylight"):
        actual = sample_case(on_workers(path, OURS_INT8, CFG), one_by_one, 2, 42)
    assert EXACT < ((actual - expected).abs().max() / expected.std()).item() < CLOSE
    assert TOLD.fullmatch(*exchanges(caplog))
