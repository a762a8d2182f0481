"""Graphs of a model whose gathered weights stay on the GPU, on gloo ranks without one."""

from __future__ import annotations

import pytest
from kept_graph_cases import numbers_of_rows, phases

from raylight.dev.local_ranks import run_ranks, values


@pytest.mark.parametrize(("world", "offload"), [(2, False), (2, True), (1, True)])
def test_as_kept_units_come_change_and_go(world: int, offload: bool) -> None:
    for rank, (units, found) in enumerate(values(run_ranks(world, phases, offload))):
        captures = rank < world - 1 or world == 1
        assert all(phase.equal for phase in found.values()), found
        # Two are measured with nothing kept, and before the next all is gathered.
        assert found["measured, and kept"].gathers == 3 * units
        assert [phase.gathers for phase in list(found.values())[1:]] == [0, 0, units, units, 2 * units, units]
        assert [phase.kept for phase in found.values()] == [*[units] * 5, 0, units]
        replays = [phase.replays for phase in found.values()]
        # One is counted, one recorded, and the third captured.
        assert replays == ([0, 2, 2, 2, 2, 0, 2] if captures else [0] * 7)
        assert [phase.graphs for phase in found.values()] == ([0, 1, 1, 1, 1, 0, 1] if captures else [0] * 7)


def test_ranks_decide_alike_where_some_replay_and_the_degrees_change() -> None:
    runs, rows = 4, (2, 2, 2, 2, 1, 1, 1, 1)
    ranks = values(run_ranks(2, numbers_of_rows, runs, rows, timeout_s=100, collective_timeout_s=20))
    (first, told), (second, told_there) = ranks
    assert all(one.error <= 1e-4 for one in (*first, *second))
    assert all(one.replayed for one in first[-2 * len(rows) :]) and not any(one.replayed for one in second)
    assert [(one.agreed, one.kept) for one in first] == [(one.agreed, one.kept) for one in second]
    # Each number of rows is measured twice, and in the end nothing is left to agree on within a run.
    assert [one.kept == 0 for one in first].count(True) == 4
    assert [one.agreed for one in first[-len(rows) :]] == [True, *[False] * 7]
    assert told == told_there
    assert len(told) == 2 * runs and len(set(told)) == 2, "each run tells both"
