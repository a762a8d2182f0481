"""Speeds that the user gives, those of a trial, and what is said of them."""

from __future__ import annotations

import pytest

from raylight.cluster import speed_check
from raylight.cluster.place import Place
from raylight.parallel.degrees import Arrangement
from raylight.parallel.mesh import MeshShape
from raylight.parallel.shares import ALIKE, Speeds
from raylight.parallel.speed_trial import Trial


def places(*names: str) -> dict[int, Place]:
    return {rank: Place(rank, "here", 100 + rank, name, rank) for rank, name in enumerate(names)}


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(speed_check.VARIABLE, raising=False)
    monkeypatch.setattr(speed_check, "_known", {})


def test_gpus_are_tried_once() -> None:
    two = places("RTX 5090", "RTX 4090")
    assert speed_check.is_wanted(two) and speed_check.speeds_of(two) == ALIKE
    speed_check.keep(two, Trial((2000, 1000), (2000, 1000)))
    assert not speed_check.is_wanted(two)
    assert speed_check.speeds_of(two) == Speeds((1000, 500), (1000, 500))


@pytest.mark.parametrize(("second", "alike"), [("RTX 5090", True), ("RTX 4090", False)])
def test_gpus_of_one_kind_differ_by_chance(second: str, alike: bool) -> None:
    two = places("RTX 5090", second)
    speed_check.keep(two, Trial((1100, 1000), (1100, 1000)))
    assert (speed_check.speeds_of(two) == ALIKE) is alike


def test_ranks_of_a_cpu_are_alike_unless_the_user_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    two = {rank: Place(rank, "here", rank, "cpu") for rank in range(2)}
    assert not speed_check.is_wanted(two)
    monkeypatch.setenv(speed_check.VARIABLE, "measure")
    assert speed_check.is_wanted(two)


@pytest.mark.parametrize(("text", "expected"), [("2,1", Speeds((2, 1), (2, 1))), ("3, 3", ALIKE), ("equal", ALIKE)])
def test_speeds_that_are_given_are_not_tried(monkeypatch: pytest.MonkeyPatch, text: str, expected: Speeds) -> None:
    two = places("A", "B")
    speed_check.keep(two, Trial((1000, 3000), (1000, 3000)))
    monkeypatch.setenv(speed_check.VARIABLE, text)
    assert speed_check.speeds_of(two) == expected and not speed_check.is_wanted(two)


@pytest.mark.parametrize(
    ("text", "message"),
    [("2,1,1", "has 3 speeds for 2 workers"), ("2,0", "has a speed below 1"), ("fast", "are no speeds")],
)
def test_rejects_what_are_no_speeds_of_these_workers(monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    monkeypatch.setenv(speed_check.VARIABLE, text)
    with pytest.raises(ValueError, match=f"RAYLIGHT_SPEEDS = {text} {message}.*such as 2,1"):
        speed_check.speeds_of(places("A", "B"))
    assert speed_check.speeds_of(places("A")) == ALIKE, "one worker shares nothing"


def test_says_who_gets_how_much_and_what_it_gains() -> None:
    two, mesh = places("RTX 5090", "RTX 4090"), MeshShape(ulysses=2)
    assert speed_check.describe(two, Arrangement(mesh)) == []
    (line,) = speed_check.describe(two, Arrangement(mesh, speeds=Speeds((1000, 600), (1000, 600))))
    assert "rank 0 (RTX 5090) 100 %, rank 1 (RTX 4090) 60 %" in line
    assert "about 1.48 times as fast as rank 0 alone, with equal shares 1.11 times" in line
    _, warning = speed_check.describe(two, Arrangement(mesh, speeds=Speeds((50, 1000), (50, 1000))))
    assert warning.startswith("rank 1 alone would be faster: the others add 5 % of its speed")
