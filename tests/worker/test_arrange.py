"""Models and process groups over many changes of the mesh: nothing piles up."""

from __future__ import annotations

from pathlib import Path

from arranged_cases import arrange_many_times, count_groups, graphs_of_ended_meshes, keep_one
from comfy_cases import CASES, checkpoint

from raylight.dev.local_ranks import run_ranks
from raylight.host.recipe import REPLICATED


def test_hooks_of_a_mesh_are_gone_on_the_next(tmp_path: Path) -> None:
    for result in run_ranks(2, arrange_many_times, checkpoint(tmp_path, CASES["Wan T2V"])):
        assert result.error is None, result.error
        for sharding, (first, last) in result.value.items():
            assert first == last[:-1], f"{sharding}: hooks have piled up, or are lost"
            assert last[-1] is False, f"{sharding}: the model does not have its own forward again"
            split_by_batch = [own for _, own in first]
            assert split_by_batch == [False, True, False, False]
        assert result.value[REPLICATED][0][0][0] > 0


def test_process_groups_are_ended_with_their_mesh() -> None:
    for result in run_ranks(4, count_groups, 2):
        assert result.error is None, result.error
        assert result.value[1] == result.value[2] == result.value[3], "groups pile up"


def test_graphs_go_before_a_mesh_is_ended() -> None:
    """NCCL does not end a communicator that a graph still uses."""
    for result in run_ranks(4, graphs_of_ended_meshes):
        assert result.error is None, result.error
        assert result.value == [1, 0]


def test_the_mesh_of_the_workers_is_kept_while_others_are_ended() -> None:
    for result in run_ranks(4, keep_one):
        assert result.error is None, result.error
        assert result.value == (True, 4)
