"""The memory of workers' GPUs, that which the user gives, and what is said of it."""

from __future__ import annotations

import pytest

from raylight.cluster import memory_check
from raylight.cluster.place import Place

GB = 10**9


def places(*gigabytes: int, gpus: tuple[int | None, ...] = (0, 1, 2)) -> dict[int, Place]:
    return {
        rank: Place(rank, "here", 100 + rank, "RTX", gpus[rank], node="a", memory_bytes=size * GB)
        for rank, size in enumerate(gigabytes)
    }


@pytest.fixture(autouse=True)
def nothing_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(memory_check.VARIABLE, raising=False)


def test_is_that_of_the_gpus_if_they_are_unlike() -> None:
    assert memory_check.memory_of(places(24, 16)) == (24 * GB, 16 * GB)
    assert memory_check.memory_of(places(24, 23)) == ()
    assert memory_check.memory_of(places(0, 0, gpus=(None, None))) == (), "a CPU's is not known"
    assert memory_check.memory_of(places(24)) == ()


def test_workers_on_one_gpu_have_a_part_of_it() -> None:
    assert memory_check.memory_of(places(24, 24, 24, gpus=(0, 1, 1))) == (24 * GB, 12 * GB, 12 * GB)


@pytest.mark.parametrize(
    ("text", "expected"), [("12,24", (12 * GB, 24 * GB)), (" 1.5, 3", (3 * GB // 2, 3 * GB)), ("equal", ())]
)
def test_the_users_comes_first(monkeypatch: pytest.MonkeyPatch, text: str, expected: tuple[int, ...]) -> None:
    monkeypatch.setenv(memory_check.VARIABLE, text)
    assert memory_check.memory_of(places(24, 16)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("24,16,8", "has 3 numbers for 2 workers"),
        ("24,0", "has a number that is not above 0"),
        ("24,nan", "has a number that is not above 0"),
        ("much", "are no numbers"),
    ],
)
def test_rejects_what_is_no_memory_of_these_workers(monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    monkeypatch.setenv(memory_check.VARIABLE, text)
    with pytest.raises(ValueError, match=f"RAYLIGHT_MEMORY = {text} {message}.*such as 24,16"):
        memory_check.memory_of(places(24, 16))
    assert memory_check.memory_of(places(24)) == (), "one worker shares nothing"


def test_says_who_has_how_much() -> None:
    two = places(24, 16)
    assert memory_check.describe(two, ()) == []
    (line,) = memory_check.describe(two, memory_check.memory_of(two))
    assert line.startswith("the workers' memory is unlike: rank 0 (RTX) 24.0 GB, rank 1 (RTX) 16.0 GB. With FSDP each")
