"""Unlike shares over NCCL: what ComfyUI gives, as graphs too; and the trial of GPUs of one kind."""

from __future__ import annotations

from pathlib import Path

import pytest
from gpu_cases import GPUS, HEADS, latent, on_workers
from torch import Tensor

from raylight.cluster import active_session, speed_check
from raylight.driver.status import overview
from raylight.host.recipe import REPLICATED, SHARDED
from raylight.parallel.graphs import ON
from raylight.parallel.mesh import MeshShape
from raylight.parallel.shares import ALIKE

pytestmark = pytest.mark.skipif(GPUS < 2, reason="one GPU shares nothing")
ULYSSES, RING = MeshShape(ulysses=max(1, GPUS)), MeshShape(ring=max(1, GPUS))
MOST_S = 3.0


def test_gpus_of_one_kind_are_alike_and_tried_in_no_time(path: Path) -> None:
    on_workers(path, REPLICATED)
    session = active_session.running()
    trial = speed_check.known(session.places)
    assert trial is not None and trial.is_complete
    assert speed_check.speeds_of(session.places) == ALIKE, f"GPUs of one kind that nothing else uses differ: {trial}"
    if (moments := session.times.session).get("speed") is not None:
        assert moments["speed"] - max(moments["links"], moments["prepared"]) < MOST_S


@pytest.mark.parametrize("sharding", [REPLICATED, SHARDED])
def test_unlike_shares_equal_comfyui(
    sharding: str, path: Path, expected: Tensor, compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    if HEADS < GPUS + 1:
        pytest.skip("every worker has one head")
    on_workers(path, sharding, mesh=ULYSSES)
    for mesh, speeds in ((RING, [3, *[1] * (GPUS - 1)]), (ULYSSES, [*[1] * (GPUS - 1), 2])):
        monkeypatch.setenv(speed_check.VARIABLE, ",".join(map(str, speeds)))  # known with the next mesh
        model = on_workers(path, sharding, mesh=mesh, graphs=ON)
        assert "by its speed" in overview()
        for turn in ("at first", "again", "as a graph"):
            compare(latent(model), expected, f"{mesh} {speeds}, {turn}")
    monkeypatch.delenv(speed_check.VARIABLE)
    on_workers(path, sharding, mesh=RING)
    assert "by its speed" not in overview()
    on_workers(path, sharding, mesh=ULYSSES)
