"""Every operation that has a rule for rows gives the rows of the whole; what mixes rows is refused."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from row_cases import IMAGES, REFUSED, VIDEOS, Errors, refuse_all, run_all

from raylight.dev.local_ranks import run_ranks, values
from raylight.parallel.rows.layout import Rows, cut
from raylight.parallel.rows.row_tensor import RULES, RowGroup, wrap

HEIGHTS = (13, 16)
NAMES = [f"image: {name}" for name in IMAGES] + [f"video: {name}" for name in VIDEOS]


@functools.cache
def errors(world: int) -> list[dict[tuple[str, int], Errors | str]]:
    return values(run_ranks(world, run_all, HEIGHTS))


@functools.cache
def refusals() -> list[dict[str, str]]:
    return values(run_ranks(2, refuse_all))


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("height", HEIGHTS)
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_those_of_the_whole(name: str, height: int, world: int) -> None:
    for rank in errors(world):
        error = rank[name, height]
        assert isinstance(error, Errors), error
        assert error.whole < 1e-3 if "far from 0" in name else error.whole < 2e-5
        # Attention sums in another order where a rank was given other strides.
        assert error.order < (2e-5 if "attention" in name else 1e-6), "channels last gives other rows"


@pytest.mark.parametrize("name", REFUSED)
def test_rejects_what_mixes_rows(name: str) -> None:
    assert all(rank[name] for rank in refusals()), "computed from this rank's rows alone"


def test_out_of_memory_is_not_for_model_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI's attention catches PyTorch's error, and would begin collectives that other ranks do not."""

    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setitem(RULES, "relu", fails)
    group: Any = None
    rows = wrap(torch.zeros(1, 1, 4, 4), Rows(-2, cut(8, 2)), RowGroup(group, 2, 0))
    with pytest.raises(MemoryError, match="CUDA out of memory") as caught:
        torch.relu(rows)
    assert not isinstance(caught.value, torch.OutOfMemoryError)
