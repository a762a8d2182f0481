"""Graphs of a model whose gathered weights stay on the GPU, on gloo ranks without one."""

from __future__ import annotations

import pytest
from kept_graph_cases import phases

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
