"""A worker that is killed in a step, a GPU that is full, and the run after it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from gpu_cases import DEPTHS, GPUS, HUGE, LONG, latent, little_room, on_workers
from torch import Tensor

from raylight.cluster import active_session
from raylight.cluster.errors import DIED, OUT_OF_MEMORY, WorkerError
from raylight.host.recipe import REPLICATED, SHARDED

LAST = GPUS - 1


@pytest.mark.parametrize(("depth", "sharding"), [("whole run", SHARDED), ("loop in ComfyUI", REPLICATED)])
def test_a_worker_killed_in_a_step(depth: str, sharding: str, path: Path, expected: Tensor, compare) -> None:
    model = on_workers(path, sharding)

    def kill(step: int) -> None:
        if step == 1:
            os.kill(active_session.running().places[LAST].pid, signal.SIGKILL)

    with pytest.raises(WorkerError, match=rf"rank {LAST} .* died while (step|beginning to forward)") as error:
        latent(model, DEPTHS[depth], LONG, steps=60, on_step=kill)
    assert error.value.kind == DIED
    compare(latent(model, DEPTHS[depth]), expected, "the run after it")


@pytest.mark.parametrize("sharding", [REPLICATED, SHARDED])
def test_a_full_gpu(sharding: str, path: Path, expected: Tensor, compare) -> None:
    model = on_workers(path, sharding)
    compare(latent(model), expected, "before")
    torch.cuda.empty_cache()
    with little_room(500):
        for _ in range(2):  # workers that start on a full GPU, too
            with pytest.raises(WorkerError, match=r"ran out of memory") as error:
                latent(model, shape=HUGE)
            assert error.value.kind == OUT_OF_MEMORY
    compare(latent(model), expected, "the run after it")
