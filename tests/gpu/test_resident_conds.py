"""The host prepares a step while the GPU computes the one before it, and no more than that."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from gpu_cases import latent

from raylight.worker.pace import Pace
from raylight.worker.resident_conds import ResidentConds

CYCLES = 100_000_000  # of the GPU, which takes 50 ms or more for them
LEAST_S = 0.04
HOST_S, SHORT_S = 0.02, 0.01
STEPS = 5
TOKENS = (700, 700)  # CUDA waits for what came before with copies of more than 64 KiB only


class Computing:
    """In place of a diffusion model: takes the host's time, to launch it, and the GPU's."""

    def __init__(self) -> None:
        self.marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __call__(self, _: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        time.sleep(HOST_S)
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        torch.cuda._sleep(CYCLES)
        ended.record()
        self.marks.append((began, ended))
        return x * 0.5

    def idle_s(self) -> list[float]:
        """Return for how long the GPU waited between forwards."""
        torch.cuda.synchronize()
        return [
            before.elapsed_time(after) / 1e3
            for (_, before), (after, _) in zip(self.marks, self.marks[1:], strict=False)
        ]


@pytest.mark.parametrize("stays", [False, True])
def test_the_gpu_has_always_a_step_to_compute(stock: ModelPatcher, stays: bool) -> None:
    model, computing, pace = stock.clone(), Computing(), Pace(stock.load_device)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "computing", computing)
    if stays:
        model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "resident", ResidentConds(model.load_device))
    moments: list[float] = []

    def on_step(_: int) -> None:
        pace.launched()
        moments.append(time.perf_counter())

    latent(model, steps=STEPS, on_step=on_step, tokens=TOKENS)
    idle = computing.idle_s()[1:]
    assert max(idle) < SHORT_S if stays else min(idle) > HOST_S / 2, idle
    assert moments[-1] - moments[0] > (STEPS - 2) * LEAST_S
