"""The parity matrix: every family, every situation, on 2, 3 and 4 ranks, against ComfyUI in one process."""

from __future__ import annotations

import functools

import pytest
from matrix_cases import Comparison, compare

from raylight.parallel.local_ranks import run_ranks, values
from raylight.zoo import families

TOLERANCE = 1e-4
WORLDS = (2, 3, 4)

CALLS = [(family.name, call) for family in families().values() for call in family.calls]


@functools.cache
def measured(world: int) -> list[dict[tuple[str, str], Comparison]]:
    return values(run_ranks(world, compare, tuple(families()), timeout_s=600))


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("family", "call"), CALLS)
def test_parity(family: str, call: str, world: int, report_parity) -> None:
    ranks = [rank[family, call] for rank in measured(world)]
    failures = {rank.failure for rank in ranks if rank.failure}
    assert not failures, "\n".join(sorted(failures))
    worst = max(rank.error for rank in ranks)
    report_parity(f"{family + ', ' + call:<50} {world} ranks   max error {worst:.1e} of the standard deviation")
    assert worst <= TOLERANCE
    for rank in ranks:
        assert rank.std > 1e-3
        # A plan that silently gathers would attend over all tokens or all heads on every rank.
        assert rank.exchanged > 0
        assert rank.largest_share <= 1.5 / world
        assert rank.heads <= -(-rank.of // world)
