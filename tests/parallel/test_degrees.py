"""Degrees by the run: what is chosen for each number of rows, and in which words."""

from __future__ import annotations

import pytest

from raylight.parallel.degrees import Arrangement, Limits, choose, gain
from raylight.parallel.mesh import MeshShape
from raylight.parallel.shares import Speeds


def chosen(rows: int, workers: int, heads: int | None = 40, ring: int = 1, fast: int = 0, may_ring: bool = True):
    arrangement = Arrangement(MeshShape(1, ring, workers // ring), by_run=True, fast_ranks=fast)
    return choose(rows, arrangement, Limits(heads, may_ring))


def axes(*args, **options) -> tuple[int, int, int]:
    shape = chosen(*args, **options).shape
    return shape.batch, shape.ring, shape.ulysses


@pytest.mark.parametrize(
    ("rows", "workers", "expected"),
    [
        (1, 1, (1, 1, 1)),
        (1, 2, (1, 1, 2)),
        (2, 2, (2, 1, 1)),
        (3, 2, (1, 1, 2)),  # 2 + 1 rows would leave a worker idle for a quarter of the time
        (4, 2, (2, 1, 1)),
        (1, 3, (1, 1, 3)),
        (2, 3, (1, 1, 3)),
        (3, 3, (3, 1, 1)),
        (1, 4, (1, 1, 4)),
        (2, 4, (2, 1, 2)),
        (3, 4, (1, 1, 4)),
        (4, 4, (4, 1, 1)),
        (6, 4, (2, 1, 2)),
        (8, 4, (4, 1, 1)),
        (2, 6, (2, 1, 3)),
        (3, 6, (3, 1, 2)),
        (1, 8, (1, 1, 8)),
        (2, 8, (2, 1, 4)),
        (3, 8, (1, 1, 8)),
        (8, 8, (8, 1, 1)),
    ],
)
def test_rows_go_to_groups_that_divide_them_and_the_rest_to_ulysses(rows, workers, expected) -> None:
    assert axes(rows, workers) == expected


def test_many_rows_go_to_groups_even_if_uneven() -> None:
    assert axes(3, 2) == (1, 1, 2) and axes(21, 2) == (2, 1, 1)


@pytest.mark.parametrize(
    ("heads", "expected"),
    [(1, (1, 4, 1)), (2, (1, 2, 2)), (3, (1, 2, 2)), (4, (1, 1, 4)), (5, (1, 2, 2)), (6, (1, 1, 4)), (24, (1, 1, 4))],
)
def test_few_or_very_uneven_heads_go_to_a_ring(heads: int, expected: tuple[int, int, int]) -> None:
    assert axes(1, 4, heads) == expected
    assert axes(2, 4, heads)[0] == 2, "rows come first"


@pytest.mark.parametrize(
    ("rows", "workers", "fast", "expected"),
    [
        (1, 4, 2, (1, 2, 2)),
        (2, 4, 2, (2, 1, 2)),
        (1, 8, 4, (1, 2, 4)),
        (2, 8, 4, (2, 1, 4)),
        (1, 6, 3, (1, 2, 3)),
        (1, 6, 2, (1, 3, 2)),
    ],
)
def test_slow_links_are_crossed_by_rows_or_by_a_ring(rows, workers, fast, expected) -> None:
    assert axes(rows, workers, fast=fast) == expected
    assert axes(rows, workers, fast=0)[1] == 1


def test_without_a_log_sum_exp_there_is_no_ring() -> None:
    assert axes(1, 4, fast=2, may_ring=False) == (1, 1, 4)
    few = chosen(1, 4, heads=3, may_ring=False)
    assert few.shape == MeshShape(2, 1, 2) and not few.splits_rows, "two groups do the same work"
    assert str(few).startswith("ulysses 2 (") and "some workers do the same work" in str(few)
    assert axes(2, 4, heads=3, may_ring=False) == (2, 1, 2)


@pytest.mark.parametrize(("rows", "expected"), [(1, (1, 2, 2)), (2, (2, 2, 1)), (4, (2, 2, 1))])
def test_a_given_ring_stays(rows: int, expected: tuple[int, int, int]) -> None:
    assert axes(rows, 4, ring=2) == expected
    assert "ring_degree = 2 is given" in str(chosen(rows, 4, ring=2))


@pytest.mark.parametrize(
    ("rows", "workers", "groups"), [(1, 2, 1), (2, 2, 2), (3, 2, 2), (2, 4, 2), (3, 4, 2), (4, 4, 4), (7, 4, 4)]
)
def test_where_tokens_cannot_be_split_rows_are_all_there_is(rows: int, workers: int, groups: int) -> None:
    one = chosen(rows, workers, heads=None)
    assert (one.shape.batch if one.splits_rows else 1) == groups and not one.splits_tokens
    assert "tokens cannot be split" in str(one) and "ulysses" not in str(one)


def test_every_choice_is_a_mesh_of_all_workers() -> None:
    for workers in range(1, 17):
        for rows in range(1, 13):
            for heads in (None, 1, 3, 12, 40):
                for may_ring in (False, True):
                    one = chosen(rows, workers, heads, may_ring=may_ring)
                    assert one.shape.world_size == workers
                    assert not one.splits_rows or rows >= one.shape.batch
                    assert heads is None or one.shape.ulysses <= heads
                    assert may_ring or one.shape.ring == 1


@pytest.mark.parametrize(
    ("rows", "speeds", "expected"),
    [
        (2, (10, 9), (2, 1, 1)),
        (2, (2, 1), (1, 1, 2)),  # the slow worker's row would be waited for
        (3, (2, 1), (2, 1, 1)),  # two rows and one
        (2, (2, 1, 2, 1), (2, 1, 2)),  # groups are alike, though their workers are not
        (2, (2, 2, 1, 1), (1, 1, 4)),
    ],
)
def test_unlike_workers_have_rows_only_if_these_fit_their_speeds(rows, speeds, expected) -> None:
    arrangement = Arrangement(MeshShape(ulysses=len(speeds)), by_run=True, speeds=Speeds(speeds, speeds))
    choice = choose(rows, arrangement, Limits(40))
    assert (choice.shape.batch, choice.shape.ring, choice.shape.ulysses) == expected
    assert ("each worker by its speed" in str(choice)) == (choice.shape.ulysses > 1)


def test_alike_workers_are_as_workers_of_unknown_speed() -> None:
    for workers in (2, 3, 4, 8):
        for rows in range(1, 6):
            for heads in (None, 3, 12, 40):
                speeds = Speeds((5,) * workers, (5,) * workers)
                arrangement = Arrangement(MeshShape(ulysses=workers), by_run=True, speeds=speeds)
                assert choose(rows, arrangement, Limits(heads)).shape == chosen(rows, workers, heads).shape


def test_the_gain_of_unlike_workers() -> None:
    speeds = Speeds((100, 50), (100, 50))
    arrangement = Arrangement(MeshShape(ulysses=2), speeds=speeds)
    assert gain(arrangement) == pytest.approx(1.5 / 1.08)
    assert gain(arrangement, by_speed=False) == pytest.approx(1 / 1.08)
    alone = Arrangement(MeshShape(ulysses=2), speeds=Speeds((100, 5), (100, 5)))
    assert gain(alone) < 1, "the fast worker alone would be faster"


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        (chosen(2, 4), "batch 2 x ulysses 2 (2 rows over 2 groups)"),
        (chosen(1, 4), "ulysses 4 (one row at a time)"),
        (chosen(3, 4), "ulysses 4 (3 rows, which 4 workers cannot divide as well as tokens)"),
        (chosen(1, 4, heads=3), "ring 2 x ulysses 2 (one row at a time, 3 attention heads for 4 workers)"),
        (chosen(1, 8, fast=4), "ring 2 x ulysses 4 (one row at a time, fast links join 4 workers at a time)"),
        (
            chosen(1, 2, heads=None),
            "every worker does all (one row at a time, this model's tokens cannot be split here, "
            "some workers do the same work)",
        ),
    ],
)
def test_says_what_and_why(choice, text: str) -> None:
    assert str(choice) == text
