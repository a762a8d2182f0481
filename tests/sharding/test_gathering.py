"""Units that a forward enters in other orders than they are listed in, more than once, or not at all; on gloo ranks."""

from __future__ import annotations

import pytest
from gathering_cases import ORDERS, gathers_after_others, orders_of_blocks

from raylight.dev.local_ranks import run_ranks, values


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("world", [1, 3])
def test_any_order_of_blocks(world: int, offload: bool) -> None:
    for found in values(run_ranks(world, orders_of_blocks, offload)):
        assert set(found) == set(ORDERS)
        for name, (equal, at_rest, gathers) in found.items():
            assert equal, name
            assert at_rest, f"{name}: a weight is not its shard after a forward"
            # The second forward of an order gathers nothing in vain.
            assert gathers <= (ORDERS[name].gathers if world > 1 else 0), name


def test_a_forward_gathers_the_same_whatever_ran_before_where_ranks_may_replay_it() -> None:
    for first, *later in values(run_ranks(2, gathers_after_others)):
        assert first
        assert all(gathered == first for gathered in later)
