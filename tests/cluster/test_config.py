"""What a configuration leaves to a cluster."""

from __future__ import annotations

from dataclasses import replace

import pytest

from raylight.cluster.config import ANY, SessionConfig
from raylight.parallel.mesh import MeshShape

OPEN = SessionConfig(MeshShape(ring=2), ANY, "host:6379", by_run=True, grows="ulysses")


def test_it_grows_as_far_as_its_axis_can() -> None:
    found = OPEN.grown(5, "cuda")
    assert found == replace(OPEN, mesh=MeshShape(ring=2, ulysses=2), device_type="cuda", grows="")
    assert not found.is_open and OPEN.is_open
    batch = replace(OPEN, mesh=MeshShape(2, 1, 2), grows="batch", by_run=False)
    assert batch.grown(9, "cpu").mesh == MeshShape(4, 1, 2)


def test_one_worker_has_no_degrees_to_choose() -> None:
    assert not replace(OPEN, mesh=MeshShape()).grown(1, "cpu").by_run


def test_rejects_fewer_than_the_least() -> None:
    with pytest.raises(ValueError, match="make 2 workers at least, and the machines .* have room for 1: lower"):
        OPEN.grown(1, "cuda")


def test_a_session_keeps_what_it_has() -> None:
    has = OPEN.grown(4, "cuda")
    assert OPEN.as_in(has) == has
    assert has.can_become(replace(OPEN, mesh=MeshShape()).as_in(has))
    assert not has.can_become(replace(OPEN, mesh=MeshShape(ring=8)).as_in(has))
    fixed = replace(has, mesh=MeshShape(ulysses=2))
    assert fixed.as_in(has) == fixed and not has.can_become(fixed)
