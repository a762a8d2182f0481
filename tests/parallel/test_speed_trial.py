"""The trial of the ranks' speeds, and what is made of its figures."""

from __future__ import annotations

import pytest
from split_cases import speed_on_the_cpu

from raylight.dev.local_ranks import run_ranks, values
from raylight.parallel.shares import ALIKE, Speeds
from raylight.parallel.speed_trial import Trial


def test_all_ranks_have_the_same_figures_of_all() -> None:
    first, second = values(run_ranks(2, speed_on_the_cpu))
    assert first == second
    assert len(first.products) == len(first.attention) == 2
    assert all(10**8 < one < 10**14 for one in (*first.products, *first.attention, *first.memory))
    assert len(first.memory) == 2


@pytest.mark.parametrize(
    ("products", "attention", "expected"),
    [
        ((700, 700), (500, 500), ALIKE),
        ((700, 680), (500, 510), ALIKE),  # within what a trial differs by
        ((700, 0), (500, 500), ALIKE),  # a rank could not do it
        ((700, 350), (500, 490), Speeds((1000, 500), (1000, 1000))),
        ((400, 100, 300), (80, 20, 60), Speeds((1000, 250, 750), (1000, 250, 750))),
        # Two of one kind beside another have one speed.
        ((200, 100, 98), (50, 24, 25), Speeds((1000, 495, 495), (1000, 490, 490))),
    ],
)
def test_speeds(products: tuple[int, ...], attention: tuple[int, ...], expected: Speeds) -> None:
    assert Trial(products, attention).speeds() == expected
