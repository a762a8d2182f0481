"""The batch axis: any batch on any number of groups of workers, against ComfyUI in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from comfy.model_patcher import ModelPatcher
from dropin_cases import SETUPS, easy_cache, equal_lengths, sample

from raylight.cluster.config import SessionConfig
from raylight.driver import api
from raylight.host.recipe import REPLICATED, SHARDED, ModelRecipe, RayModel, WorkerConfig
from raylight.parallel.mesh import MeshShape

pytestmark = pytest.mark.usefixtures("as_comfyui_runs_nodes")

TOLERANCE = 1e-4


def dropin(path: Path, mesh: MeshShape, sharding: str = REPLICATED, kernel: str = "TORCH_FLASH") -> ModelPatcher:
    return api.load(
        RayModel(WorkerConfig(SessionConfig(mesh, "cpu"), kernel), ModelRecipe.of(str(path), "default", sharding))
    )


SETS = {
    "same length": equal_lengths,
    "other length": SETUPS["plain"],
    "one prompt": SETUPS["basic_shifted"],
    "replaced blocks": SETUPS["skipped_layers"],
    "cached": easy_cache,
}

# The mesh changes slowest, so that all tests of one mesh share its workers.
CHOICES = [
    (mesh, sharding, batch, name)
    for mesh in (MeshShape(batch=2), MeshShape(batch=3))
    for sharding in (REPLICATED, SHARDED)
    for batch in ((1, 2, 3, 5) if sharding == REPLICATED else (1, 3))
    for name in (list(SETS) if batch == 3 and sharding == REPLICATED else list(SETS)[:2])
]
CHOICES += [(MeshShape(batch=2, ulysses=2), REPLICATED, batch, "same length") for batch in (1, 2)]
CHOICES += [(MeshShape(batch=2, ulysses=2), SHARDED, 1, "other length")]
SMOKE = (MeshShape(batch=2), REPLICATED, 1, "same length")


@pytest.mark.parametrize(
    ("mesh", "sharding", "batch", "name"),
    [
        pytest.param(
            *choice,
            marks=[
                *([pytest.mark.smoke] if choice == SMOKE else []),
                *([pytest.mark.slow] if choice[0].world_size > 2 else []),
            ],
        )
        for choice in CHOICES
    ],
)
def test_equals_comfyui(
    mesh: MeshShape, sharding: str, batch: int, name: str, path: Path, stock: ModelPatcher, results: dict
) -> None:
    shape = (batch, 16, 10, 13)
    if (batch, name) not in results:
        results[batch, name] = sample(SETS[name](stock), "euler_ancestral", shape=shape, steps=2)[0]
    expected = results[batch, name]
    actual, _ = sample(SETS[name](dropin(path, mesh, sharding)), "euler_ancestral", shape=shape, steps=2)
    assert actual.shape == expected.shape
    assert ((actual - expected).abs().max() / expected.std()).item() <= TOLERANCE


@pytest.fixture(scope="module")
def results() -> dict:
    return {}
