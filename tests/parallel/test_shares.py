"""Unlike ranks: each gets tokens, heads and rows by its speed, and the result is that of one process."""

from __future__ import annotations

import functools
from fractions import Fraction
from itertools import product

import pytest
from batch_cases import doubled
from split_cases import CASES, split_toy

from raylight.dev.local_ranks import run_ranks, values
from raylight.parallel.exchange_layout import head_chunks
from raylight.parallel.partition import divide, partition, shard_stream
from raylight.parallel.rows.layout import cut
from raylight.parallel.shares import Speeds

# Ranks, those in the ring, chunks of an exchange, and speeds in matrix products and in attention.
WORLDS = {
    "2:1": (2, 1, 1, Speeds((2, 1), (2, 1))),
    "1:3, in two chunks": (2, 1, 2, Speeds((1, 3), (2, 5))),
    "3:1:2": (3, 1, 1, Speeds((3, 1, 2), (2, 1, 2))),
    "ring 1:4": (2, 2, 1, Speeds((1, 4), (1, 4))),
    "ring 3:1:2": (3, 3, 1, Speeds((3, 1, 2), (3, 1, 2))),
    "ring 2 x Ulysses 2": (4, 2, 1, Speeds((1, 2, 1, 3), (1, 2, 1, 3))),
}


@functools.cache
def reports(name: str) -> list[dict]:
    world, ring, chunks, speeds = WORLDS[name]
    return values(run_ranks(world, split_toy, ring, "TORCH", chunks, speeds))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", CASES)
def test_unlike_ranks_equal_one_process(world: str, name: str) -> None:
    case, (ranks, ring, chunks, speeds) = CASES[name], WORLDS[world]
    tokens = divide(case.img, ranks, speeds.products if ring == 1 else speeds.overall)
    text = divide(case.txt, ranks, speeds.products if ring == 1 else speeds.overall)
    for rank, report in enumerate(reports(world)):
        error, largest_query, exchanged, fewest_heads = report[name]
        assert error <= 1e-5
        assert exchanged == 4
        if min(case.img, case.txt) >= ranks:
            assert largest_query == tokens[rank] + text[rank]
        if ring == chunks == 1:
            assert fewest_heads == divide(case.heads, ranks, speeds.attention)[rank]


def test_alike_ranks_share_as_without_speeds() -> None:
    for total, parts in product((3, 4, 7, 29, 75600), (2, 3)):
        assert divide(total, parts, (7,) * parts) == partition(total, parts)
    assert cut(90, 4, 8, (5, 5, 5, 5)) == cut(90, 4, 8)


@pytest.mark.parametrize("weights", [(2, 1), (1, 9), (1000, 1), (3, 1, 2), (100, 97, 53, 100)])
@pytest.mark.parametrize("total", [4, 5, 12, 40, 1001])
def test_no_other_sizes_end_sooner(weights: tuple[int, ...], total: int) -> None:
    sizes = divide(total, len(weights), weights)
    assert sum(sizes) == total and min(sizes) >= 1
    relative = [Fraction(size, weight) for size, weight in zip(sizes, weights, strict=True) if size > 1]
    slowest = max(relative, default=0)
    for size, weight in zip(sizes, weights, strict=True):
        assert Fraction(size + 1, weight) >= slowest, "one more here and one less there would end sooner"


def test_every_rank_gets_a_head_and_the_fast_one_most() -> None:
    (chunk,) = head_chunks(heads=12, group=1, ranks=3, count=1, weights=(1, 100, 21))
    assert chunk.queries == ((0, 1), (1, 10), (10, 12))


def test_a_token_goes_to_the_rank_with_the_smallest_load_for_its_speed() -> None:
    assert shard_stream(1, (4, 3, 3)).sizes == (0, 0, 1)
    assert shard_stream(1, (8, 3, 3), (4, 1, 1)).sizes == (1, 0, 0)


def test_a_slow_rank_keeps_the_rows_that_a_reshape_needs() -> None:
    assert cut(16, 2, 1, (50, 1), least=2).sizes == (14, 2)
    assert cut(90, 2, 8, (9, 1), least=2).bounds == (0, 72, 90)


def test_groups_of_the_batch_axis_share_rows_by_their_speed() -> None:
    for rank, report in enumerate(values(run_ranks(2, doubled, [2, 3, 7], Speeds((3, 1), (3, 1))))):
        assert [rows for rows, *_ in report] == [(1, 1)[rank], (2, 1)[rank], (6, 1)[rank]]
        assert all(equal for _, *both in report for equal in both)


def test_rejects_speeds_that_are_not_of_all_ranks() -> None:
    with pytest.raises(ValueError, match="two for each rank"):
        Speeds((2, 1), (2,))
