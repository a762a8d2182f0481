"""A split model against the same model in one process, on real gloo ranks."""

from __future__ import annotations

import functools
import time

import pytest
from split_cases import CASES, Case, chunks_by_links, one_rank_fails, split_toy, uneven_collectives, votes

from raylight.dev.local_ranks import run_ranks, values
from raylight.parallel.partition import partition


@functools.cache
def toy_reports(world: int, ring: int = 1, name: str = "", chunks: int = 1) -> list[dict]:
    return values(run_ranks(world, split_toy, ring, name, chunks))


def queries(case: Case, world: int, rank: int) -> int:
    """Return the number of tokens in a rank's tensors, with a placeholder for a stream with too few."""
    return max(partition(case.txt, world)[rank], 1) + max(partition(case.img, world)[rank], 1)


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_ulysses_equals_one_process(world: int, name: str) -> None:
    case = CASES[name]
    for rank, report in enumerate(toy_reports(world)):
        error, largest_query, exchanged, fewest_heads = report[name]
        assert error <= 1e-5
        # Two joint blocks in each of two forwards, and no token attended by more than its own rank.
        assert exchanged == 4
        assert largest_query == queries(case, world, rank)
        # Also where that divides a group of queries between two ranks.
        assert fewest_heads == partition(case.heads, world)[rank]


@pytest.mark.parametrize(("world", "chunks"), [(2, 2), (3, 2), (2, 3)])
@pytest.mark.parametrize("name", CASES)
def test_an_exchange_in_chunks_equals_one_process(world: int, chunks: int, name: str) -> None:
    case = CASES[name]
    for rank, report in enumerate(toy_reports(world, chunks=chunks)):
        error, _, exchanged, fewest_heads = report[name]
        assert error <= 1e-5
        assert exchanged == 4
        mine = partition(case.heads, world)[rank]
        assert fewest_heads == mine // min(chunks, min(partition(case.heads, world)))


@pytest.mark.parametrize(
    ("world", "ring", "kernel"), [(2, 2, "TORCH"), (3, 3, "TORCH_FLASH"), (4, 2, "TORCH_FLASH"), (4, 2, "TORCH")]
)
@pytest.mark.parametrize("name", CASES)
def test_ring_and_hybrid_equal_one_process(world: int, ring: int, kernel: str, name: str) -> None:
    case = CASES[name]
    for rank, report in enumerate(toy_reports(world, ring, kernel)):
        error, largest_query, exchanged, _ = report[name]
        assert error <= 1e-5
        assert exchanged == 4
        assert largest_query == queries(case, world, rank)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_uneven_collectives(world: int) -> None:
    assert all(values(run_ranks(world, uneven_collectives)))


def test_votes() -> None:
    assert values(run_ranks(3, votes)) == [(True, False, 98, (True, 98), (False, -1))] * 3


@pytest.mark.parametrize("how", ["raises", "dies"])
def test_a_fault_in_one_rank_ends_the_others(how: str) -> None:
    started = time.monotonic()
    answers = run_ranks(2, one_rank_fails, how, collective_timeout_s=10, timeout_s=200)
    assert answers[0].error is not None and answers[0].error != "never answered"
    if how == "raises":
        assert "simulated fault" in answers[1].error
    assert time.monotonic() - started < 150


def test_an_exchange_over_fast_links_is_not_divided() -> None:
    assert values(run_ranks(2, chunks_by_links)) == [[2, 1, 2, 1]] * 2
