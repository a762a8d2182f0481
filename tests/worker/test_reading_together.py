"""Whole models that ranks read together where they can, each by itself where they cannot, and in step always."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from comfy_cases import CASES, checkpoint
from shared_read_cases import loads

from raylight.dev.local_ranks import run_ranks, values

TOGETHER = ("fresh", "again", "after that")
ALONE = ("one in part", "one out of memory", "one has it already", "slow link")


@functools.cache
def loaded(folder: Path, dtype: torch.dtype | None) -> list[dict[str, tuple[bool, bool]]]:
    return values(run_ranks(2, loads, checkpoint(folder, CASES["Flux"]), dtype, timeout_s=200))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=["the file's dtype", "float16"])
@pytest.mark.parametrize("way", TOGETHER + ALONE)
def test_weights_are_those_that_a_rank_reads_alone(way: str, dtype: torch.dtype | None, folder: Path) -> None:
    for rank in loaded(folder, dtype):
        same, shared = rank[way]
        assert same
        assert shared is (way in TOGETHER)


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=["the file's dtype", "float16"])
def test_a_cancel_ends_the_read_of_all(dtype: torch.dtype | None, folder: Path) -> None:
    for rank in loaded(folder, dtype):
        assert rank["one cancels"] == (True, True)  # and the loads after it are in step
