"""How much of a model's weights each rank holds by its memory."""

from __future__ import annotations

import pytest

from raylight.parallel.memory_shares import held_by_each, shares_of


@pytest.mark.parametrize(
    ("nbytes", "memory", "held"),
    [
        (28, (24, 16), (18, 10)),  # 6 are left on each
        (28, (16, 24), (10, 18)),
        (20, (32, 12, 12), (20, 0, 0)),  # 12 are left on each
        (24, (32, 12, 16), (20, 0, 4)),
        (60, (24, 16), (34, 26)),  # more than there is: 10 are lacking on each
        (8, (24, 16), (4, 4)),  # there is room for all of it on each
        (28, (), (14, 14)),
        (28, (24, 24), (14, 14)),
    ],
)
def test_equally_much_is_left(nbytes: int, memory: tuple[int, ...], held: tuple[int, ...]) -> None:
    gigabytes = tuple(one * 10**9 for one in memory)
    found = held_by_each(nbytes * 10**9, len(held), gigabytes)
    assert [round(one / 1e9, 3) for one in found] == list(held)


def test_alike_memory_has_no_shares() -> None:
    assert shares_of(28, ()) == shares_of(28, (24, 24)) == shares_of(8, (24, 16)) == ()
