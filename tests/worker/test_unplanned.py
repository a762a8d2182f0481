"""Models without a plan: the first forward is whole, and only what is proven equal is split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from comfy_cases import CASES, checkpoint
from unplanned_toys import graphed_day, sampled, toy_day

from raylight.dev.local_ranks import run_ranks, values
from raylight.host.recipe import REPLICATED, SHARDED
from raylight.parallel.mesh import MeshShape

TOLERANCE = 1e-4


def test_a_split_is_proven_once_for_each_length_and_then_used(tmp_path: Path) -> None:
    for day in values(run_ranks(3, toy_day, "", (10, 10, 7, 7, 10), torch.float32, tmp_path / "plans.json")):
        assert day.error <= TOLERANCE
        assert day.plans == 2
        # The whole one, one for each rank's part without exchanges, and the real one.
        assert day.forwards == (5, 1, 5, 1, 1)
        assert day.exchanges == (2, 2, 2, 2, 2)


def test_a_proof_is_kept_for_later_sessions(tmp_path: Path) -> None:
    file = tmp_path / "plans.json"
    values(run_ranks(2, toy_day, "", (10,), torch.float32, file))
    for day in values(run_ranks(2, toy_day, "", (10, 12), torch.float32, file)):
        assert day.error <= TOLERANCE
        assert day.forwards == (1, 4)
    content = json.loads(file.read_text())
    ((key, entry),) = content.items()
    file.write_text(json.dumps({key.replace("ComfyUI ", "ComfyUI 9"): entry}))
    for day in values(run_ranks(2, toy_day, "", (10,), torch.float32, file)):
        assert day.forwards == (4,)


def test_a_file_that_makes_no_sense_is_not_used(tmp_path: Path) -> None:
    file = tmp_path / "plans.json"
    values(run_ranks(2, toy_day, "", (10,), torch.float32, file))
    content = json.loads(file.read_text())
    for entry in content.values():
        entry["plans"] = [{"model": "toy", "heads": 4}]
    file.write_text(json.dumps(content))
    for day in values(run_ranks(2, toy_day, "", (10,), torch.float32, file)):
        assert day.forwards == (4,)


@pytest.mark.parametrize(
    ("flaw", "length", "dtype"),
    [
        # Ranks get 4, 3 and 3 tokens: two of them would raise between exchanges that the other is in.
        pytest.param("odd", 10, torch.float32, id="an error on some ranks"),
        pytest.param("mean", 11, torch.float32, id="tokens mixed without attention"),
        # A wrong token at a border is little of the norm of all.
        pytest.param("convolution", 6000, torch.bfloat16, id="wrong at the border only"),
    ],
)
def test_what_is_not_equal_is_not_split(
    flaw: str, length: int, dtype: torch.dtype, tmp_path: Path, report_parity
) -> None:
    file = tmp_path / "plans.json"
    for day in values(run_ranks(3, toy_day, flaw, (length, length), dtype, file)):
        assert day.plans == 0
        assert day.error <= (TOLERANCE if dtype == torch.float32 else 0.05)
        assert day.forwards[1] == 1
        assert day.exchanges[1] == 0
        (said,) = day.said
        assert "Toy has no plan, and none could be drafted (" in said
        assert "docs/adding-a-model.md" in said
    assert not file.exists()


def test_too_few_heads_are_said(tmp_path: Path) -> None:
    for day in values(run_ranks(5, toy_day, "", (10,), torch.float32, tmp_path / "plans.json")):
        assert "4 attention heads, too few for ulysses_degree = 5" in day.said[0]
        assert day.exchanges == (0,)


@pytest.mark.parametrize(
    ("world", "sharding", "shape"),
    [
        (2, REPLICATED, MeshShape(ulysses=2)),
        (2, SHARDED, MeshShape(ulysses=2)),
        (2, REPLICATED, MeshShape(ring=2)),
        pytest.param(4, SHARDED, MeshShape(batch=2, ulysses=2), marks=pytest.mark.slow),
    ],
)
def test_sampling(world: int, sharding: str, shape: MeshShape, tmp_path: Path, report_parity) -> None:
    path = checkpoint(tmp_path, CASES["Wan T2V"])
    user = tmp_path / "user"
    for error, said, told in values(run_ranks(world, sampled, path, sharding, shape, user, timeout_s=300)):
        report_parity(f"{'Wan T2V without a plan, ' + sharding:<60} {shape}   max error {error:.1e}")
        assert error <= TOLERANCE
        assert "WanModel has no plan: a drafted one splits its tokens over 2 workers" in said[0]
        assert not told
    assert (user / "__raylight" / "drafted_plans.json").exists()


def test_degrees_by_the_run(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, CASES["Wan T2V"])
    ranks = run_ranks(2, sampled, path, REPLICATED, MeshShape(ulysses=2), tmp_path / "user", "cpu", True, timeout_s=300)
    for error, said, told in values(ranks):
        assert error <= TOLERANCE
        assert "WanModel has no plan: a drafted one splits its tokens over 2 workers" in said[0]
        assert told == ["ulysses 2 (no plan: a drafted one is proven)"]


@pytest.mark.parametrize("degrees_by_run", [False, True])
def test_known_rows_are_divided_without_a_proof(degrees_by_run: bool, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, CASES["Wan T2V"])
    user, shape = tmp_path / "user", MeshShape(ulysses=2)
    ranks = run_ranks(2, sampled, path, REPLICATED, shape, user, "cpu", degrees_by_run, True, timeout_s=300)
    for error, said, told in values(ranks):
        assert error <= TOLERANCE
        assert "workers can only split its batch" in said[0]
        assert told if degrees_by_run else any("a batch of" in line for line in said[1:])
    assert not (user / "__raylight").exists()


@pytest.mark.parametrize("shards", [False, True], ids=["replicated", "sharded"])
@pytest.mark.parametrize(("flaw", "exchanges"), [("", 2), ("mean", 0)])
def test_graphs_are_captured_only_of_what_is_proven(flaw: str, exchanges: int, shards: bool, tmp_path: Path) -> None:
    # The proof; as it is; recorded; captured; another proof, beside the graph; replayed.
    lengths = (10, 10, 10, 10, 7, 10)
    for calls in values(run_ranks(2, graphed_day, flaw, lengths, tmp_path / "plans.json", shards)):
        errors, captures, replays, exchanged = zip(*calls, strict=True)
        assert max(errors) <= TOLERANCE
        assert captures == (0, 0, 0, 1, 1, 1)
        assert replays == (0, 0, 0, 1, 1, 2)
        assert exchanged[1:4] == (exchanges,) * 3 and exchanged[5] == exchanges
