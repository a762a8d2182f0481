"""Which machine gets which rank."""

from __future__ import annotations

import time

import pytest

from raylight.cluster import placement
from raylight.cluster.config import SessionConfig
from raylight.cluster.errors import RunCancelled
from raylight.cluster.machines import Machine, assign, fast_ranks, splits_ulysses, workers_on
from raylight.parallel.mesh import MeshShape


@pytest.mark.parametrize(
    ("room", "mesh", "expected"),
    [
        # All on one machine if one has room, the first that does.
        ([2, 4], MeshShape(ulysses=4), [1, 1, 1, 1]),
        ([4, 8], MeshShape(batch=2, ulysses=2), [0, 0, 0, 0]),
        # Sequence groups as a whole, though more would fit on the first.
        ([3, 3], MeshShape(batch=2, ulysses=2), [0, 0, 1, 1]),
        ([0, 2, 2], MeshShape(batch=2, ring=2), [1, 1, 2, 2]),
        # A ring goes across, Ulysses does not.
        ([3, 2], MeshShape(ring=2, ulysses=2), [0, 0, 1, 1]),
        ([5, 3], MeshShape(ring=2, ulysses=3), [0, 0, 0, 1, 1, 1]),
        # Ulysses goes across only where nothing else is possible.
        ([1, 1], MeshShape(ulysses=2), [0, 1]),
        ([3, 1], MeshShape(ring=2, ulysses=2), [0, 0, 0, 1]),
        ([1, 1], MeshShape(ulysses=3), None),
    ],
)
def test_ranks_are_spread_by_what_they_exchange(room: list[int], mesh: MeshShape, expected: list[int] | None) -> None:
    assert assign(room, mesh) == expected


@pytest.mark.parametrize(
    ("machines", "expected"), [("aa", 0), ("ab", 1), ("aabb", 2), ("aaab", 1), ("aaaabb", 2), ("aabbcc", 2)]
)
def test_links_within_a_machine_are_fast(machines: str, expected: int) -> None:
    assert fast_ranks(machines) == expected


def test_ulysses_across_machines_is_noticed() -> None:
    assert not splits_ulysses("aabb", MeshShape(ring=2, ulysses=2))
    assert splits_ulysses("aaab", MeshShape(ring=2, ulysses=2))


def test_machines_of_one_name_are_told_apart(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    config = SessionConfig(MeshShape(ulysses=2), "cpu", "host:6379")
    placement._note(config, [Machine(address, "localhost", address, 1) for address in ("10.0.0.1", "10.0.0.2")])
    assert "0 on localhost (10.0.0.1), 1 on localhost (10.0.0.2)" in caplog.text
    assert "ulysses_degree = 2 goes over the network" in caplog.text


def test_machines_are_not_asked_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def alive_and_free() -> tuple[list[Machine], dict[str, dict[str, float]]]:
        asked.append(time.monotonic())
        return [Machine("a", "a", "10.0.0.1", 1)], {"a": {"CPU": 1.0}}

    monkeypatch.setattr(placement.machines, "alive_and_free", alive_and_free)
    cancel_at = time.monotonic() + 2.5
    with pytest.raises(RunCancelled):
        config = SessionConfig(MeshShape(ulysses=2), "cpu", "host:6379")
        placement.reserve(config, lambda: time.monotonic() > cancel_at)
    assert time.monotonic() - cancel_at < 1
    assert 2 <= len(asked) <= 3


def test_room_is_that_of_the_scarcest_resource() -> None:
    assert workers_on({"CPU": 3.5, "GPU": 2}, {"CPU": 1, "GPU": 1}) == 2
    assert workers_on({"CPU": 1.5, "GPU": 2}, {"CPU": 1, "GPU": 1}) == 1
    assert workers_on({"CPU": 8}, {"CPU": 1, "GPU": 1}) == 0
