"""Groups of ranks with fast links, from measured bandwidths."""

from __future__ import annotations

import itertools

import pytest

from raylight.parallel.bandwidth import Links, fast_ranks


def links(ranks: int, group: int, inside: float, between: float) -> Links:
    pairs = itertools.combinations(range(ranks), 2)
    return Links(True, 1e-5, {(a, b): inside if a // group == b // group else between for a, b in pairs})


@pytest.mark.parametrize(
    ("ranks", "group", "inside", "between", "expected"),
    [
        (2, 2, 200e9, 200e9, 0),
        (4, 4, 200e9, 200e9, 0),
        (4, 2, 200e9, 20e9, 2),
        (4, 2, 20e9, 15e9, 0),  # both of one kind
        (8, 4, 300e9, 10e9, 4),
        (8, 2, 50e9, 10e9, 2),
        (6, 3, 50e9, 10e9, 3),
        (4, 3, 200e9, 20e9, 0),  # three beside one cannot be a mesh
    ],
)
def test_fast_ranks(ranks: int, group: int, inside: float, between: float, expected: int) -> None:
    assert fast_ranks(links(ranks, group, inside, between), ranks) == expected


def test_pairs_that_were_not_measured_count_as_any() -> None:
    some = links(4, 2, 200e9, 20e9)
    del some.bytes_per_s[2, 3]
    assert fast_ranks(some, 4) == 0
