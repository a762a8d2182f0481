"""Models without a plan: the first forward is whole, and only what is proven equal is split."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from pathlib import Path

import pytest
import torch
from comfy_cases import CASES, checkpoint
from torch import Tensor
from unplanned_toys import Day, compiled_calls, graphed_days, sampled, sampled_each, toy_days

from raylight.dev.local_ranks import run_ranks, values
from raylight.host.recipe import REPLICATED, SHARDED
from raylight.parallel.external_strategies import OURS_INT8
from raylight.parallel.mesh import MeshShape
from raylight.parallel.plan import SequencePlan
from raylight.worker.proving import Forward, Inputs, Way

TOLERANCE = 1e-4
PROVEN = "proven"
# By what is tested: the flaw, and the lengths of the sequences.
DAYS = {
    PROVEN: ("", (10, 10, 7, 7, 10), torch.float32),
    # Ranks get 4, 3 and 3 tokens: two of them would raise between exchanges that the other is in.
    "an error on some ranks": ("odd", (10, 10), torch.float32),
    "tokens mixed without attention": ("mean", (11, 11), torch.float32),
    "tokens mixed in later steps only": ("late", (11, 11), torch.float32),
    # A wrong token at a border is little of the norm of all.
    "wrong at the border only": ("convolution", (3000, 3000), torch.bfloat16),
    "keeps": ("keeps", (10,) * 4, torch.float32),
    "many lengths": ("", (*range(8, 18), 8), torch.float32),
    "few heads": ("few heads", (10,), torch.float32),
}


def files() -> dict[str, Path]:
    """Return where each day keeps its plans."""
    folder = Path(folder_of_all().name)
    return {name: folder / f"{name}.json" for name in DAYS}


@functools.cache
def folder_of_all() -> tempfile.TemporaryDirectory[str]:
    """Return a folder for the whole of these tests."""
    return tempfile.TemporaryDirectory()


@functools.cache
def days() -> dict[str, list[Day]]:
    """Return what each of three ranks measured, by day."""
    ranks = values(run_ranks(3, toy_days, [(*case, files()[name]) for name, case in DAYS.items()], timeout_s=300))
    return {name: [rank[index] for rank in ranks] for index, name in enumerate(DAYS)}


def test_a_split_is_proven_once_for_each_length_and_then_used() -> None:
    for day in days()[PROVEN]:
        assert day.error <= TOLERANCE
        assert day.plans == 2
        # The whole one, one for each rank's part without exchanges, the real one, and another both ways.
        assert day.forwards == (7, 1, 7, 1, 1)
        assert day.exchanges == (4, 2, 4, 2, 2)
        assert day.of_rows == (), "tokens are split, and not rows"


def test_a_proof_is_kept_for_later_sessions(tmp_path: Path) -> None:
    days()
    content = json.loads(files()[PROVEN].read_text())
    ((key, entry),) = content.items()
    same, newer, broken = (tmp_path / f"{name}.json" for name in ("same", "newer", "broken"))
    same.write_text(json.dumps(content))
    newer.write_text(json.dumps({key.replace("ComfyUI ", "ComfyUI 9"): entry}))
    broken.write_text(json.dumps({key: {**entry, "plans": [{"model": "toy", "heads": 4}]}}))
    cases = [("", (10, 12), torch.float32, same), *(("", (10,), torch.float32, file) for file in (newer, broken))]
    for later, with_newer, with_broken in values(run_ranks(3, toy_days, cases)):
        assert max(later.error, with_newer.error, with_broken.error) <= TOLERANCE
        assert later.forwards == (1, 7)
        assert with_newer.forwards == with_broken.forwards == (7,)


@pytest.mark.parametrize(
    "flaw", [name for name, case in DAYS.items() if case[0] in ("odd", "mean", "late", "convolution")]
)
def test_what_is_not_equal_is_not_split(flaw: str) -> None:
    for day in days()[flaw]:
        assert day.plans == 0
        assert day.error <= (0.05 if "border" in flaw else TOLERANCE)
        assert day.forwards[1] == 1
        assert day.exchanges[1] == 0
        (said,) = day.said
        assert "Toy has no plan, and none could be drafted (" in said
        assert "docs/adding-a-model.md" in said
    assert not files()[flaw].exists()


def test_what_keeps_something_between_forwards_is_never_repeated() -> None:
    for day in days()["keeps"]:
        assert day.error <= TOLERANCE
        assert day.plans == 0
        assert day.forwards == (1, 1, 1, 1)
        (said,) = day.said
        assert "Toy has no plan, and keeps something from one forward to the next" in said


def test_proofs_of_one_run_are_limited() -> None:
    for day in days()["many lengths"]:
        assert day.error <= TOLERANCE
        assert day.forwards == (*(7,) * 8, 1, 1, 1)
        assert day.exchanges[-3:] == (0, 0, 2)


def test_too_few_heads_are_said() -> None:
    for day in days()["few heads"]:
        assert "2 attention heads, too few for ulysses_degree = 3" in day.said[0]
        assert day.exchanges == (0,)


@pytest.mark.parametrize(("rank", "is_sharded"), [(None, False), (0, True)])
def test_out_of_memory_that_others_may_wait_for_is_no_failed_proof(rank: int | None, is_sharded: bool) -> None:
    def compute(way: Way, alone: int | None, inputs: Inputs) -> Tensor:
        if alone == rank:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(1, 2)

    way = Way(SequencePlan("toy", {}, {}, {}))
    recovered: list[bool] = []
    forward = Forward(compute, lambda: recovered.append(True), torch.zeros(1, 2), 1, False, is_sharded)
    with pytest.raises(torch.OutOfMemoryError):
        forward.prove([way])
    if rank is not None:  # the same for all ranks, each by itself
        assert "out of memory" in dataclasses.replace(forward, is_sharded=False).prove([way]).reason
        assert recovered


# By what is tested: weights, degrees, device, whether degrees are by the run, and whether rows are known to be
# independent.
SAMPLED = {
    "replicated": (REPLICATED, MeshShape(ulysses=2), "cpu", False, False),
    "sharded": (SHARDED, MeshShape(ulysses=2), "cpu", False, False),
    "ring": (REPLICATED, MeshShape(ring=2), "cpu", False, False),
    "degrees by the run": (REPLICATED, MeshShape(ulysses=2), "cpu", True, False),
    "known rows": (REPLICATED, MeshShape(ulysses=2), "cpu", False, True),
    "known rows, degrees by the run": (REPLICATED, MeshShape(ulysses=2), "cpu", True, True),
    "in 8 bits": (REPLICATED, MeshShape(ulysses=2), "cpu", False, False, OURS_INT8),
}


def users() -> dict[str, Path]:
    """Return the user folder of each case of `SAMPLED`."""
    return {name: Path(folder_of_all().name, name) for name in SAMPLED}


@functools.cache
def samples() -> dict[str, list[tuple[float, list[str], list[str]]]]:
    """Return what each of two ranks returned, by case."""
    path = checkpoint(Path(folder_of_all().name), CASES["Wan T2V"])
    cases = [(sharding, shape, users()[name], *rest) for name, (sharding, shape, *rest) in SAMPLED.items()]
    ranks = values(run_ranks(2, sampled_each, path, cases, timeout_s=300))
    return {name: [rank[index] for rank in ranks] for index, name in enumerate(SAMPLED)}


@pytest.mark.parametrize("case", ["replicated", "sharded", "ring", "degrees by the run"])
def test_sampling(case: str, report_parity) -> None:
    for error, said, told in samples()[case]:
        report_parity(f"{'Wan T2V without a plan, ' + case:<60} max error {error:.1e}")
        assert error <= TOLERANCE
        assert "WanModel has no plan: a drafted one splits its tokens over 2 workers" in said[0]
        assert told == (["ulysses 2 (no plan: a drafted one is proven)"] if case == "degrees by the run" else [])
    assert (users()[case] / "__raylight" / "drafted_plans.json").exists()


def test_a_plan_is_proven_by_an_exact_exchange_where_the_user_has_chosen_another() -> None:
    for error, said, _ in samples()["in 8 bits"]:
        assert TOLERANCE < error < 5e-2
        assert "WanModel has no plan: a drafted one splits its tokens over 2 workers" in said[0]


@pytest.mark.parametrize("case", ["known rows", "known rows, degrees by the run"])
def test_known_rows_are_divided_without_a_proof(case: str) -> None:
    for error, said, told in samples()[case]:
        assert error <= TOLERANCE
        assert "workers can only split its batch" in said[0]
        assert told if "degrees" in case else any("a batch of" in line for line in said[1:])
    assert not (users()[case] / "__raylight").exists()


@pytest.mark.slow
def test_sampling_with_groups(tmp_path: Path) -> None:
    path, shape = checkpoint(tmp_path, CASES["Wan T2V"]), MeshShape(batch=2, ulysses=2)
    for error, said, _ in values(run_ranks(4, sampled, path, SHARDED, shape, tmp_path / "user", timeout_s=300)):
        assert error <= TOLERANCE
        assert "WanModel has no plan: a drafted one splits its tokens over 2 workers" in said[0]


@pytest.mark.slow
def test_a_compiled_model_is_whole(tmp_path: Path) -> None:
    for calls in values(run_ranks(2, compiled_calls, tmp_path / "plans.json", timeout_s=200)):
        errors, exchanges = zip(*calls, strict=True)
        assert max(errors) <= TOLERANCE
        assert exchanges == (0, 4, 2, 0)


GRAPHED = [(flaw, shards) for flaw in ("", "mean") for shards in (False, True)]


@functools.cache
def graphed() -> list[list[list[tuple[float, int, int, int]]]]:
    """Return what each of two ranks measured of each of `GRAPHED`."""
    # The proof; as it is; recorded; captured; another proof, beside the graph; replayed.
    lengths = (10, 10, 10, 10, 7, 10)
    cases = [(*case, Path(folder_of_all().name, f"graphed{index}.json")) for index, case in enumerate(GRAPHED)]
    return values(run_ranks(2, graphed_days, lengths, cases))


@pytest.mark.parametrize(("flaw", "shards"), GRAPHED)
def test_graphs_are_captured_only_of_what_is_proven(flaw: str, shards: bool) -> None:
    exchanges = 0 if flaw else 2
    for rank in graphed():
        errors, captures, replays, exchanged = zip(*rank[GRAPHED.index((flaw, shards))], strict=True)
        assert max(errors) <= TOLERANCE
        assert captures == (0, 0, 0, 1, 1, 1)
        assert replays == (0, 0, 0, 1, 1, 2)
        assert exchanged[1:4] == (exchanges,) * 3 and exchanged[5] == exchanges
