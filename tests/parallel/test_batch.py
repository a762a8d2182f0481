"""Batch rows: which rows of arguments each rank gets, and that each rank computes only its own."""

from __future__ import annotations

import pytest
import torch
from batch_cases import doubled

from raylight.dev.local_ranks import run_ranks, values
from raylight.parallel.batch import Rows
from raylight.parallel.partition import partition

TOTALS = [2, 3, 5, 7]


@pytest.mark.parametrize("world", [2, 3])
def test_each_rank_computes_its_rows_and_gets_all(world: int) -> None:
    totals = [total for total in TOTALS if total >= world]
    for rank, report in enumerate(values(run_ranks(world, doubled, totals))):
        for total, (rows, *equal) in zip(totals, report, strict=True):
            assert rows == partition(total, world)[rank]
            assert equal == [True, True]


def test_rows_of_arguments_are_those_of_tensors_with_the_batch() -> None:
    rows, latent = Rows(1, 3, 4), torch.arange(8).view(4, 2)
    arguments = {
        "context": latent,
        "table": torch.zeros(1, 5),
        "scalar": torch.tensor(4),
        "many": [latent, None, 3],
        "control": {"input": (latent,)},
        "text": "four",
    }
    cut = rows.of(arguments)
    assert torch.equal(cut["context"], latent[1:3])
    assert torch.equal(cut["many"][0], latent[1:3]) and cut["many"][1:] == [None, 3]
    assert torch.equal(cut["control"]["input"][0], latent[1:3])
    assert cut["table"].shape == (1, 5) and cut["scalar"] == 4 and cut["text"] == "four"


@pytest.mark.parametrize(
    ("rows", "marks", "expected"),
    [
        (Rows(0, 2, 4), [0, 1], [0]),
        (Rows(2, 4, 4), [0, 1], [1]),
        (Rows(1, 3, 4), [0, 1], [0, 1]),
        (Rows(2, 4, 6), [0, 1], [0, 1]),
        (Rows(0, 2, 6), [0, 1], [0, 0]),
        (Rows(1, 3, 3), [0, 1, 0], [1, 0]),
    ],
)
def test_marks_of_chunks_are_those_of_the_rows(rows: Rows, marks: list[int], expected: list[int]) -> None:
    assert rows.of_chunks(marks) == expected
