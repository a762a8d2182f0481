"""Units that a forward enters in other orders than they are listed in, more than once, or not at all; on gloo ranks."""

from __future__ import annotations

import pytest
from gathering_cases import ORDERS, UNEVEN, gathers_after_others, in_step, names_of_collectives, orders_of_blocks
from kept_gathering_cases import (
    NUMBERS,
    after_a_change,
    after_what_ends_a_forward,
    bytes_that_units_take,
    kept_in_orders,
    nested_blocks,
)

from raylight.dev.local_ranks import run_ranks, values
from raylight.parallel.shares import Weights


@pytest.mark.parametrize(("offload", "shares"), [(False, ()), (False, UNEVEN), (True, ())])
@pytest.mark.parametrize("world", [1, 3])
def test_any_order_of_blocks(world: int, offload: bool, shares: Weights) -> None:
    for found in values(run_ranks(world, orders_of_blocks, offload, "cpu", shares)):
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


@pytest.mark.parametrize(("offload", "shares"), [(False, ()), (False, UNEVEN), (True, ())])
def test_ranks_in_step_may_enter_other_blocks(offload: bool, shares: Weights) -> None:
    ranks = values(run_ranks(3, in_step, offload, shares, timeout_s=60, collective_timeout_s=20))
    for first, *others in zip(*ranks, strict=True):
        for found in (first, *others):
            assert all(equal for equal, _, _ in found)
            assert all(at_rest for _, at_rest, _ in found), "a weight is not its shard after a forward"
            # Blocks are of one size, so that one instead of another one would not be noticed.
            assert [blocks for *_, blocks in found] == [blocks for *_, blocks in first]
    # Where all enter the same as in the last forward, they gather nothing in vain.
    assert [len(ranks[0][0][place][2]) for place in (0, 1, 6, 8)] == [5, 5, 5, 5]


def test_gloo_is_asked_for_no_collective_that_may_corrupt_memory() -> None:
    """Of collectives with long names, as all coalesced ones have, its threads write to freed memory: see `Gatherer`."""
    for names in values(run_ranks(2, names_of_collectives)):
        assert any("gather" in name for name in names) and any("broadcast" in name for name in names)
        assert not [name for name in names if "coalesced" in name]


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("world", [1, 3])
def test_kept_units_are_gathered_once(world: int, offload: bool) -> None:
    gathers_at_all = world > 1 or offload
    for found in values(run_ranks(world, kept_in_orders, offload)):
        assert len(found) == len(ORDERS) * len(NUMBERS)
        for name, number, equal, at_rest, gathers in found:
            assert equal, (name, number)
            assert at_rest, f"{name}, {number} kept: a weight is not its shard after a forward"
            if gathers_at_all and name.startswith("as listed"):
                assert gathers == 6 - number, name
            elif gathers_at_all:
                assert gathers <= ORDERS[name].gathers, (name, number)
            if gathers_at_all and number == 6:
                assert gathers == 0, name


@pytest.mark.parametrize("offload", [False, True])
def test_kept_units_after_a_forward_that_did_not_end(offload: bool) -> None:
    for found in values(run_ranks(2, after_what_ends_a_forward, offload)):
        assert all(equal for equal, _ in found)
        assert [gathers for _, gathers in found][1::3] == [2, 2, 0, 0]
        assert [gathers for _, gathers in found][2::3] == [4, 4, 4, 4]


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_kept_units_are_gathered_again_when_weights_have_changed(world: int, offload: bool) -> None:
    for found in values(run_ranks(world, after_a_change, offload)):
        assert all(equal for equal, _ in found)
        if world > 1 or offload:
            assert [gathers for _, gathers in found] == [6, 2, 6, 2]


def test_kept_units_nested_in_others() -> None:
    for found in values(run_ranks(2, nested_blocks, False)):
        assert all(equal for equal, _ in found)
        assert [gathers for _, gathers in found][2::3] == [6, 4, 2, 0]


def test_what_kept_units_take_is_known() -> None:
    for found in values(run_ranks(2, bytes_that_units_take)):
        for number, (between, within, kept, passing) in enumerate(found):
            assert between == kept, number
            assert kept <= within <= kept + passing, number
        assert found[0][:1] == (0,) and found[-1][3] == 0
