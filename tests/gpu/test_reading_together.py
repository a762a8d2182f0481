"""Whole weights that GPUs read together over NCCL are those that each reads by itself, fresh and again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gpu_cases import GPUS
from safetensors.torch import load_file, save_file
from shared_read_cases import loads_on_gpus

from raylight.dev.demo.tiny import write_checkpoint
from raylight.dev.local_ranks import run_ranks, values

HEADS, PARAMETERS = 12, 300_000_000  # several rounds of an exchange


@pytest.fixture(scope="module")
def large(folder: Path) -> Path:
    path, layers = folder / "together.safetensors", -(-PARAMETERS // (12 * (128 * HEADS) ** 2))
    write_checkpoint(path, "wan-t2v", heads=HEADS, layers=layers)
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    return path


@pytest.mark.parametrize("world", [2, 4])
def test_weights_are_those_that_a_rank_reads_alone(
    world: int, large: Path, report_parity: Callable[[str], None]
) -> None:
    if world > GPUS:
        pytest.skip(f"needs {world} GPUs")
    dtypes = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn]
    ranks = values(run_ranks(world, loads_on_gpus, large, dtypes, timeout_s=300, device_type="cuda"))
    for way in ranks[0]:
        same, together, left = zip(*(rank[way] for rank in ranks), strict=True)
        report_parity(f"{world} GPUs, {way}: equal {all(same)}, together {all(together)}, left {max(left):.3f}")
        assert all(same) and all(together)
        assert max(left) < 0.01
