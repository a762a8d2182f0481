"""What stays gathered between forwards: as much as every rank has room for, on gloo ranks with simulated memory."""

from __future__ import annotations

import pytest
from gathering_cases import BLOCKS
from kept_units_cases import (
    PER_ROW,
    Ran,
    beside_graphs,
    failed_on_one,
    larger_ones,
    lost_before_a_method,
    of_jobs,
    released_on_one,
    with_loras,
    with_rooms,
    without_memory_on_one,
)

from raylight.dev.local_ranks import run_ranks, values

ALL = 1 + BLOCKS


def gathers(found: list[Ran]) -> list[int]:
    return [one.gathers for one in found]


def numbers(found: list[Ran]) -> list[int]:
    return [one.number for one in found]


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(
    # More than these take as many bytes as all, which need no other buffers.
    ("rooms", "number"),
    [((ALL, ALL), ALL), ((ALL, 2), 2), ((1, ALL), 1), ((0, ALL), 0), ((2, 4, 5), 2)],
)
def test_as_many_as_every_rank_has_room_for(rooms: tuple[int, ...], number: int, offload: bool) -> None:
    for found in values(run_ranks(len(rooms), with_rooms, list(rooms), offload)):
        assert all(one.equal for one in found)
        assert numbers(found) == [0, 0, *[number] * 5]
        assert gathers(found) == [ALL, ALL, ALL, *[ALL - number] * 4]


@pytest.mark.parametrize("held", [0, PER_ROW])
@pytest.mark.parametrize("come_first", [False, True])
def test_room_for_graphs(come_first: bool, held: int) -> None:
    # Units that pass need buffers, in the graph and beside it: so much that none fits if not all do.
    less = 0 if come_first else ALL
    assert values(run_ranks(2, beside_graphs, come_first, held)) == [[ALL, less]] * 2


def test_one_rank_with_offloaded_weights() -> None:
    (found,) = values(run_ranks(1, with_rooms, [3], True))
    assert all(one.equal for one in found)
    assert gathers(found) == [ALL, ALL, ALL, *[ALL - 3] * 4]


def test_larger_forwards_find_their_memory() -> None:
    for found in values(run_ranks(2, larger_ones)):
        assert all(one.equal for one in found)
        assert numbers(found[:5]) == [0, 0, ALL, ALL, ALL]
        assert numbers(found[5:7]) == [0, 0]
        assert numbers(found[7:11]) == [2] * 4
        assert numbers(found[11:]) == [2, 2, ALL, ALL]


def test_what_one_rank_has_lost_all_gather_again() -> None:
    for found in values(run_ranks(2, released_on_one)):
        assert all(one.equal for one in found)
        assert gathers(found) == [ALL, ALL, ALL, 0, ALL, 0]


@pytest.mark.parametrize("offload", [False, True])
def test_what_one_rank_has_lost_is_gathered_again_before_the_first_forward(offload: bool) -> None:
    for found in values(run_ranks(2, lost_before_a_method, offload, timeout_s=60, collective_timeout_s=15)):
        # What is outside of blocks: each time, as long as nothing is kept.
        assert found == [(True, 1), (True, 1), (True, 0), (True, 0), (True, 1), (True, 1)]


def test_a_rank_without_memory_for_what_was_agreed() -> None:
    for found in values(run_ranks(2, without_memory_on_one)):
        assert all(one.equal for one in found)
        assert numbers(found) == [0, 0, 0, 0, ALL, ALL]


def test_a_measured_forward_that_failed_on_one_rank() -> None:
    for found in values(run_ranks(2, failed_on_one)):
        assert all(one.equal for one in found)
        # The first finds it out, two more are measured.
        assert numbers(found) == [0, 0, 0, ALL, ALL]


def test_jobs() -> None:
    for found in values(run_ranks(2, of_jobs)):
        assert all(one.equal for ran in found.values() for one in ran)
        assert gathers(found["first"]) == [ALL, ALL, ALL, 0]
        assert gathers(found["the next step by itself"]) == [0]
        assert numbers(found["memory is wanted on one rank"]) == [2, 2]
        assert gathers(found["none may be kept"]) == [ALL, ALL]
        assert gathers(found["as at first"]) == [ALL, 0]
        assert numbers(found["in another context"]) == [0, 0, ALL]


@pytest.mark.parametrize(("world", "offload"), [(2, False), (2, True), (1, True)])
def test_loras_and_a_model_that_leaves(world: int, offload: bool) -> None:
    for found in values(run_ranks(world, with_loras, offload, timeout_s=200)):
        assert all(equal for equal, _, _ in found)
        first, *_ = (gathers for _, gathers, _ in found)
        assert [gathers for _, gathers, _ in found] == [first, first, first, 0, first, 0, first, 0, 0, first, 0]
        kept = found[3][2]
        assert kept > 0
        assert [one for *_, one in found] == [0, 0, *[kept] * 6, 0, kept, kept]
