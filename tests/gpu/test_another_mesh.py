"""The same workers on one mesh after another, over NCCL: what ComfyUI gives, in no time, in no more memory."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from gpu_cases import DEPTHS, GPUS, WORKERS, latent, on_workers
from torch import Tensor

from raylight.cluster import active_session
from raylight.driver import api
from raylight.host.recipe import REPLICATED, SHARDED
from raylight.parallel.mesh import MeshShape

ULYSSES = WORKERS.config.mesh
MESHES = [ULYSSES, MeshShape(batch=ULYSSES.world_size), MeshShape(ring=ULYSSES.world_size)]
MESHES += [MeshShape(2, 1, GPUS // 2), MeshShape(1, 2, GPUS // 2)] if GPUS > 3 and GPUS % 2 == 0 else []
MOST_S = 2.0
MOST_BYTES = 64 << 20  # that a GPU may lose from one round over all meshes to the next

pytestmark = pytest.mark.skipif(GPUS < 2, reason="one GPU has one mesh")


def free_bytes() -> list[int]:
    """The free memory of each GPU."""
    return [torch.cuda.mem_get_info(index)[0] for index in range(GPUS)]


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("sharding", [REPLICATED, SHARDED])
def test_each_mesh(depth: str, sharding: str, path: Path, lora: Path, expected: Tensor, compare) -> None:
    compare(latent(on_workers(path, sharding), DEPTHS[depth]), expected, "at first")
    places = dict(active_session.running().places)
    for mesh in (*MESHES[1:], *MESHES):
        began = time.monotonic()
        model = on_workers(path, sharding, mesh=mesh)
        took = time.monotonic() - began
        compare(latent(model, DEPTHS[depth]), expected, f"{mesh.batch} x {mesh.ring} x {mesh.ulysses}")
        assert took < MOST_S, f"{mesh} took {took:.1f} s"
    assert active_session.running().places == places


def test_memory_over_many_changes(path: Path) -> None:
    free: list[list[int]] = []
    for _ in range(6):  # graphs of all kinds of forwards are captured in the third
        for mesh in MESHES:
            latent(on_workers(path, REPLICATED, mesh=mesh), steps=1)
        free.append(free_bytes())
    for before, after in zip(free[3], free[-1], strict=True):
        assert before - after < MOST_BYTES, "process groups pile up"


def test_the_start_beside_a_prompt(path: Path, expected: Tensor, compare) -> None:
    """Also the time of a start, in the list of results."""
    api.end_workers(with_ray=False)
    began = time.monotonic()
    api.begin(WORKERS, replace=True)
    assert time.monotonic() - began < 1
    model = on_workers(path, REPLICATED)
    compare(latent(model), expected, f"after {time.monotonic() - began:.1f} s")
