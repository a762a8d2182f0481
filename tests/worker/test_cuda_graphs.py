"""Every family's forwards as graphs, on a backend without a GPU, on one rank and on two."""

from __future__ import annotations

import functools
from collections import ChainMap

import pytest
from graph_cases import FORWARDS, Outcome, every_call, on_one_rank

from raylight.dev.local_ranks import run_ranks, values
from raylight.dev.zoo import families
from raylight.parallel.graph_inputs import WatchedOptions
from raylight.parallel.mesh import MeshShape
from raylight.worker import batch_parallel
from raylight.worker.layouts import RowsAre

CALLS = [(family.name, call) for family in families().values() for call in family.calls]
PATCHED = "nodes have put patches into the model"


SHARDED = ("Flux Dev", "Wan T2V", "Qwen Image")


@functools.cache
def measured(world: int) -> list[dict[tuple[str, str], Outcome]]:
    """Measure all families on ranks that compute together, or one rank, in two processes that halve the families."""
    names = tuple(families())
    if world == 1:
        return [dict(ChainMap(*values(run_ranks(2, on_one_rank, names, timeout_s=900))))]
    return values(run_ranks(world, every_call, names, MeshShape(ulysses=world), timeout_s=900))


def test_sharded_weights_are_gathered_in_a_graph() -> None:
    ranks = values(run_ranks(2, every_call, SHARDED, MeshShape(ulysses=2), False, True, True, timeout_s=300))
    for outcomes in ranks:
        assert not any(outcome.failure for outcome in outcomes.values()), outcomes
        assert all(outcome.equal for outcome in outcomes.values())
    assert {outcome.replays for outcome in ranks[0].values()} == {0, FORWARDS - 2}  # none with patches
    assert {outcome.replays for outcome in ranks[1].values()} == {0}


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("family", "call"), CALLS)
def test_a_replayed_forward_equals_the_eager_one(family: str, call: str, world: int) -> None:
    outcomes = [rank[family, call] for rank in measured(world)]
    assert not any(outcome.failure for outcome in outcomes), outcomes[0].failure
    assert all(outcome.equal for outcome in outcomes)
    first = outcomes[0]
    if any(PATCHED in reason for reason in first.reasons):
        assert first.replays == 0
    else:
        assert first.replays == FORWARDS - 2, first.reasons
    if world > 1:
        assert outcomes[-1].replays == 0  # it cannot capture, and the others replay beside it


def test_the_split_of_rows_reads_few_options() -> None:
    """Within a graph of a whole call; others, such as the number of a step, may change from call to call."""
    options = WatchedOptions({"step": 1, "patches": {}})
    assert batch_parallel._rows_in({"transformer_options": options}) is RowsAre.INDEPENDENT
    assert options.reads == {"patches", "patches_replace"}
