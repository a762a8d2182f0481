"""Families whose weights are held by the memory of unlike ranks, against ComfyUI in one process."""

from __future__ import annotations

import functools

import pytest
from sharded_cases import Case, Sharded, compare_sharded

from raylight.dev.local_ranks import run_ranks, values

TOLERANCE = 1e-4
# Parts of the weights, so that a tenth is left on each, and one holds nothing but rounded up.
MEMORY, HELD = (0.8, 0.1, 0.4), (0.7, 0.0, 0.3)
CASES = [
    (family, sequence, False, patched)
    for family in ("Wan T2V", "Flux Dev", "Qwen Image", "Hunyuan Video")
    for sequence in (False, True)
    for patched in (False, True)
]


@functools.cache
def measured() -> list[dict[Case, Sharded]]:
    return values(run_ranks(len(MEMORY), compare_sharded, tuple(CASES), MEMORY, timeout_s=900))


@pytest.mark.parametrize(("family", "sequence", "offload", "patched"), CASES)
def test_held_by_memory(family: str, sequence: bool, offload: bool, patched: bool, report_parity) -> None:
    ranks = [rank[family, sequence, offload, patched] for rank in measured()]
    failures = {rank.failure for rank in ranks if rank.failure}
    assert not failures, "\n".join(sorted(failures))
    worst = max(rank.error for rank in ranks)
    how = f"FSDP by memory{' + Ulysses' if sequence else ''}{', two LoRAs' if patched else ''}"
    report_parity(f"{family:<42} {how:<39} max error {worst:.1e} of the standard deviation")
    assert worst <= (TOLERANCE if sequence or patched else 0.0)
    assert not patched or ranks[0].effect > 0.02
    sharded = [rank.report.sharded_bytes for rank in ranks]
    assert [round(one / sum(sharded), 1) for one in sharded] == list(HELD)
    assert sum(sharded) + ranks[0].report.replicated_bytes == ranks[0].report.model_bytes
