"""Tensors that ranks read together: what arrives, that each byte is read once, and how a read ends early."""

from __future__ import annotations

import pytest
from shared_read_cases import fingerprints, read_all, stopped

from raylight.dev.local_ranks import run_ranks, values


@pytest.mark.parametrize("round_bytes", [1 << 9, 5000, 1 << 30])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_all_arrives_and_is_read_once(world: int, round_bytes: int) -> None:
    ranks = values(run_ranks(world, read_all, round_bytes))
    assert all(same for same, *_ in ranks)
    assert sum(read for _, read, *_ in ranks) == ranks[0][2]
    assert all(read < 0.8 * total for _, read, total, _ in ranks) or world == 1
    assert all(difference == 0 for *_, difference in ranks), "all of it was reported on each rank"


def test_a_stop_ends_it_on_all_ranks() -> None:
    assert values(run_ranks(2, stopped)) == [(True, True)] * 2


def test_the_fingerprint_tells_apart_what_ranks_would_do() -> None:
    assert values(run_ranks(2, fingerprints)) == [[True] * 5] * 2
