"""Ray's start on a machine that is too busy for the limit that Ray itself has."""

from __future__ import annotations

import os

import pytest
from ray._private import services

from raylight.cluster import patient_start as module
from raylight.cluster.patient_start import patient_start


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with each look for the raylet, which is found by the fifth."""
    seen: list[int] = []

    def get_node(address: str, node: int) -> str:
        seen.append(node)
        if len(seen) < 5:
            raise RuntimeError("it has not registered")
        return f"{node} at {address}"

    monkeypatch.setattr(services, "get_node", get_node)
    monkeypatch.setattr(module, "_LOOK_S", 0.001)
    return seen


def test_waits_for_a_raylet_that_runs(tries: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_raylet_runs", lambda: True)
    before = services.get_node
    with patient_start(180.0):
        assert os.environ["RAY_gcs_server_port_wait_time_s"] == "150"
        assert services.get_node("here", 7) == "7 at here"
    assert services.get_node is before and "RAY_gcs_server_port_wait_time_s" not in os.environ


@pytest.mark.parametrize(("runs", "timeout_s"), [(False, 180.0), (True, 1.0)])
def test_gives_up_when_it_has_ended_or_time_is_over(
    runs: bool, timeout_s: float, tries: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_raylet_runs", lambda: runs)
    with patient_start(timeout_s), pytest.raises(RuntimeError, match="it has not registered"):
        services.get_node("here", 7)
    assert tries == [7]
