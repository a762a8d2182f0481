"""The estimated time of a forward: what it must be in cases that can be worked out by hand."""

from __future__ import annotations

import pytest

from raylight.parallel.estimate import REST_BYTES, Hardware, Work, forward_s
from raylight.parallel.mesh import MeshShape
from raylight.parallel.shares import Speeds

WORK = Work(tokens=12000, weights=10**9, attentions=10, width=1200, heads=12)
FAST_LINK, NO_LATENCY = 1e30, 0.0


def hardware(*speeds: int, link: float = FAST_LINK) -> Hardware:
    return Hardware(speeds, speeds, link, NO_LATENCY)


def test_one_rank_does_all() -> None:
    products, attention = 2 * 10**9 * 12000, 4 * 12000**2 * 1200 * 10
    assert forward_s(WORK, 1, MeshShape(), hardware(10**12)) == pytest.approx((products + attention) / 10**12)


def test_the_rest_takes_the_time_of_its_bytes() -> None:
    def of(*memory: int) -> Hardware:
        ranks = (10**12,) * len(memory)
        return Hardware(ranks, ranks, FAST_LINK, NO_LATENCY, memory)

    without = forward_s(WORK, 1, MeshShape(), hardware(10**12))
    rest = 12000 * 1200 * 10 * REST_BYTES / 10**9
    assert forward_s(WORK, 1, MeshShape(), of(10**9)) == pytest.approx(without + rest)
    assert forward_s(WORK, 1, MeshShape(ulysses=2), of(10**9, 10**9)) == pytest.approx((without + rest) / 2)
    # The others wait for the rank whose memory is slow.
    unlike = of(10**12, 10**9)
    assert forward_s(WORK, 1, MeshShape(ulysses=2), unlike) == pytest.approx((without + rest) / 2)
    assert forward_s(WORK, 1, MeshShape(), unlike.alone(1)) == pytest.approx(without + rest)


@pytest.mark.parametrize("shape", [MeshShape(ulysses=4), MeshShape(ring=4), MeshShape(ring=2, ulysses=2)])
def test_without_a_link_to_wait_for_four_ranks_take_a_quarter(shape: MeshShape) -> None:
    alone = forward_s(WORK, 1, MeshShape(), hardware(10**12))
    assert forward_s(WORK, 1, shape, hardware(*[10**12] * 4)) == pytest.approx(alone / 4)


def test_rows_over_groups_exchange_nothing() -> None:
    alone = forward_s(WORK, 2, MeshShape(), hardware(10**12))
    assert forward_s(WORK, 2, MeshShape(batch=2), hardware(10**12, 10**12, link=1.0)) == pytest.approx(alone / 2)


def test_unlike_ranks_reach_the_sum_of_their_speeds_by_shares_and_wait_without() -> None:
    unlike, shape = hardware(2 * 10**12, 10**12), MeshShape(ulysses=2)
    alone = forward_s(WORK, 1, MeshShape(), unlike.alone(0))
    shared = forward_s(WORK, 1, shape, unlike, Speeds((2, 1), (2, 1)))
    assert alone / shared == pytest.approx(1.5)
    assert alone / forward_s(WORK, 1, shape, unlike) == pytest.approx(1.0)


def test_a_slow_link_makes_two_ranks_slower_than_one() -> None:
    alone = forward_s(WORK, 1, MeshShape(), hardware(10**14))
    times = [
        forward_s(WORK, 1, MeshShape(ulysses=2), hardware(10**14, 10**14, link=link)) for link in (1e11, 1e10, 1e8)
    ]
    assert times == sorted(times) and times[0] < alone < times[-1]
    # A ring sends beside attention.
    assert forward_s(WORK, 1, MeshShape(ring=2), hardware(10**14, 10**14, link=1e11)) < times[0]


@pytest.mark.parametrize("shape", [MeshShape(ulysses=4), MeshShape(ring=4)])
def test_fewer_bytes_take_less_time_where_the_link_is_slow(shape: MeshShape) -> None:
    free, slow = hardware(*[10**12] * 4), hardware(*[10**12] * 4, link=1e6)
    computing, full, half = (
        forward_s(WORK, 1, shape, of, sent_bytes=size) for of, size in ((free, 2.0), (slow, 2.0), (slow, 1.0))
    )
    least = 0.0 if shape.ulysses > 1 else forward_s(WORK, 1, MeshShape(), hardware(10**12)) / 4
    assert computing < half < full
    assert (half - least) / (full - least) == pytest.approx(0.5, abs=0.1)
