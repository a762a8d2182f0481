"""A machine that does not answer is found in time, and one that answers now and then is not."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from waiting import wait_until

from raylight.cluster import machine_watch, machines
from raylight.cluster.config import SessionConfig
from raylight.cluster.machine_watch import LOST_S, MachineWatch
from raylight.cluster.machines import Machine
from raylight.cluster.place import Place
from raylight.cluster.watchdog import Watchdog
from raylight.parallel.mesh import MeshShape

GOOD, BAD = Machine("1", "good", "10.0.0.1", 1), Machine("2", "bad", "10.0.0.2", 1)


class Clock:
    """A clock that goes only when it is told to: how busy this machine is does not matter."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(machine_watch, "_EVERY_S", 0.01)
    monkeypatch.setattr(machine_watch, "time", SimpleNamespace(monotonic=made))
    return made


def test_a_silent_machine_is_lost(clock: Clock) -> None:
    asked: list[Machine] = []

    def ask(machine: Machine, _: float) -> bool:
        asked.append(machine)
        return machine is GOOD

    watch = MachineWatch([GOOD, BAD], ask)
    try:
        wait_until(lambda: asked.count(BAD) > 2)
        assert watch.lost() is None
        clock.now_s = LOST_S + 0.1
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


def test_one_answer_is_enough(clock: Clock) -> None:
    asked: list[Machine] = []
    found: list[Machine | None] = []

    def now_and_then(machine: Machine, _: float) -> bool:
        found.append(watch.lost())
        clock.now_s += 0.4 * LOST_S
        asked.append(machine)
        return len(asked) % 3 == 0

    watch = MachineWatch([BAD], now_and_then)
    try:
        wait_until(lambda: len(asked) > 20)
        assert set(found) == {None}
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
