"""Degrees that each run chooses, over NCCL: what ComfyUI gives, with one set of workers."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from gpu_cases import DEPTHS, GPUS, SHAPE, latent, on_workers
from torch import Tensor

from raylight.cluster import active_session
from raylight.host.recipe import REPLICATED, SHARDED

SAME, OTHER = (24, 24), (24, 17)
RUNS = {
    "2 rows": (SAME, 1),
    "1 row": (OTHER, 1),
    "4 rows": (SAME, 2),
    "6 rows": (SAME, 3),
    "2 rows of images": (OTHER, 2),
}
MOST_S = 2.0
MOST_BYTES = 64 << 20  # that a GPU may lose from one round over all runs to the next

pytestmark = pytest.mark.skipif(GPUS < 2, reason="one GPU has nothing to choose")


def of_batch(count: int) -> tuple[int, ...]:
    return count, *SHAPE[1:]


@pytest.fixture(scope="module")
def wanted(stock: ModelPatcher) -> dict[str, Tensor]:
    with torch.inference_mode():
        return {name: latent(stock, shape=of_batch(count), tokens=tokens) for name, (tokens, count) in RUNS.items()}


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("sharding", [REPLICATED, SHARDED])
def test_each_run(
    depth: str, sharding: str, path: Path, wanted: dict[str, Tensor], compare, caplog: pytest.LogCaptureFixture
) -> None:
    model = on_workers(path, sharding, by_run=True)
    session = active_session.running()
    for turn in ("at first", "again"):
        for name, (tokens, count) in RUNS.items():
            caplog.clear()
            with caplog.at_level(logging.INFO, "raylight"):
                actual = latent(model, DEPTHS[depth], shape=of_batch(count), tokens=tokens)
            chosen = [line for line in caplog.messages if line.startswith("degrees: ")]
            assert len(chosen) == 1
            compare(actual, wanted[name], f"{name}, {turn}: {chosen[0]}")
    assert active_session.running() is session


def test_changes_take_no_time_and_no_memory(path: Path) -> None:
    model = on_workers(path, REPLICATED, by_run=True)
    free: list[list[int]] = []
    seconds: dict[str, list[float]] = {name: [] for name in RUNS}
    for _ in range(6):  # graphs of all kinds of forwards are captured in the third
        for name, (tokens, count) in RUNS.items():
            began = time.monotonic()
            latent(model, shape=of_batch(count), tokens=tokens, steps=1)
            seconds[name].append(time.monotonic() - began)
        free.append([torch.cuda.mem_get_info(index)[0] for index in range(GPUS)])
    for name, taken in seconds.items():
        assert taken[0] - min(taken) < MOST_S + 5, f"{name}: the first run took {taken}"
        assert max(taken[1:]) - min(taken) < MOST_S, f"{name}: {taken}"
    for before, after in zip(free[3], free[-1], strict=True):
        assert before - after < MOST_BYTES, "process groups pile up"
