"""Models without a plan on GPUs: proven in bfloat16, and what is wrong at a border of shards only is found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comfy_cases import CASES, checkpoint
from unplanned_toys import sampled, toy_day

from raylight.dev.local_ranks import run_ranks, values
from raylight.host.recipe import REPLICATED, SHARDED
from raylight.parallel.mesh import MeshShape

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize(("flaw", "plans"), [("", 2), ("convolution", 0), ("odd", 0)])
def test_in_16_bits(flaw: str, plans: int, tmp_path: Path) -> None:
    # 2049 tokens on one rank and 2048 on the other.
    lengths = (4097, 4097, 1000) if not flaw else (4098 if flaw == "odd" else 4096,) * 2
    days = values(
        run_ranks(2, toy_day, flaw, lengths, torch.bfloat16, tmp_path / "plans.json", "cuda", device_type="cuda")
    )
    for day in days:
        assert day.plans == plans
        assert day.error <= 0.1
        assert bool(day.exchanges[1]) == bool(plans)


@pytest.mark.parametrize("sharding", [REPLICATED, SHARDED])
def test_sampling(sharding: str, tmp_path: Path, report_parity) -> None:
    path = checkpoint(tmp_path, CASES["Wan T2V"])
    ranks = values(
        run_ranks(
            2,
            sampled,
            path,
            sharding,
            MeshShape(ulysses=2),
            tmp_path / "user",
            "cuda",
            timeout_s=240,
            device_type="cuda",
        )
    )
    for error, said, _ in ranks:
        report_parity(f"{'Wan T2V without a plan on GPUs, ' + sharding:<60} max error {error:.1e}")
        assert any("a drafted one splits its tokens over 2 workers" in line for line in said), said
        assert error <= 0.05
