"""A machine that does not answer is found in time, and one that answers now and then is not."""

from __future__ import annotations

import time

import pytest

from raylight.cluster import machine_watch, machines
from raylight.cluster.actor import Place
from raylight.cluster.config import SessionConfig
from raylight.cluster.machine_watch import MachineWatch
from raylight.cluster.machines import Machine
from raylight.cluster.watchdog import Watchdog
from raylight.parallel.mesh import MeshShape

GOOD, BAD = Machine("1", "good", "10.0.0.1", 1), Machine("2", "bad", "10.0.0.2", 1)


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_watch, "_EVERY_S", 0.01)
    monkeypatch.setattr(machine_watch, "LOST_S", 0.3)


def test_a_silent_machine_is_lost() -> None:
    watch = MachineWatch([GOOD, BAD], lambda machine, _: machine is GOOD)
    try:
        assert watch.lost() is None
        deadline = time.monotonic() + 10
        while watch.lost() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert watch.lost() is BAD
    finally:
        watch.stop()


def test_a_suspected_machine_is_asked_at_once() -> None:
    watch = MachineWatch([GOOD, BAD], lambda machine, _: machine is GOOD)
    try:
        assert watch.lost("1") is None
        assert watch.lost("2") is BAD
    finally:
        watch.stop()


def test_one_answer_is_enough() -> None:
    asked: list[Machine] = []

    def now_and_then(machine: Machine, _: float) -> bool:
        asked.append(machine)
        return len(asked) % 3 == 0

    watch = MachineWatch([BAD], now_and_then)
    try:
        until = time.monotonic() + 1
        while time.monotonic() < until:
            assert watch.lost() is None
            time.sleep(0.01)
        assert len(asked) > 5
    finally:
        watch.stop()


def test_a_list_of_machines_that_does_not_come_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "LIST_S", 0.2)
    monkeypatch.setattr(machines, "known", lambda: time.sleep(5))
    watchdog = Watchdog(SessionConfig(MeshShape(), "cpu", "host:6379"), lambda _: None)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="Ray's list of the cluster's machines has not ended within 0.2 s"):
        watchdog.set_places({0: Place(0, "10.0.0.1", 1, "cpu")})
    assert time.monotonic() - began < 4
