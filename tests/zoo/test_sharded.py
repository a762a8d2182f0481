"""Every family with its weights sharded, with and without split tokens, against ComfyUI in one process."""

from __future__ import annotations

import functools

import pytest
from sharded_cases import Case, Sharded, compare_sharded

from raylight.dev.local_ranks import run_ranks, values
from raylight.dev.zoo import families

TOLERANCE = 1e-4
FULLY = ("Wan T2V", "Flux Dev", "Qwen Image", "Hunyuan Video")
HOW = [
    (world, sequence, offload)
    for world in (2, 3)
    for sequence, offload in ((False, False), (True, False), (True, True))
]
CASES = [
    *((name, 2, True, False, False) for name in families() if name not in FULLY),
    *((name, *how, patched) for name in FULLY for how in HOW for patched in (False, True)),
]


@functools.cache
def measured(world: int) -> list[dict[Case, Sharded]]:
    """Measure all cases of a number of ranks at once: ranks start once."""
    cases = tuple((name, *how) for name, ranks, *how in CASES if ranks == world)
    return values(run_ranks(world, compare_sharded, cases, timeout_s=1500))


@pytest.mark.timeout(1800)  # the first test of a number of ranks waits for all cases on as many
@pytest.mark.parametrize(
    ("family", "world", "sequence", "offload", "patched"),
    [pytest.param(*case, marks=[pytest.mark.slow] if case[1] > 2 else []) for case in CASES],
)
def test_sharded(family: str, world: int, sequence: bool, offload: bool, patched: bool, report_parity) -> None:
    ranks = [rank[family, sequence, offload, patched] for rank in measured(world)]
    failures = {rank.failure for rank in ranks if rank.failure}
    assert not failures, "\n".join(sorted(failures))
    worst = max(rank.error for rank in ranks)
    how = f"FSDP {world}{' offloaded' if offload else ''}{' + Ulysses' if sequence else ''}"
    how += ", two LoRAs" if patched else ""
    report_parity(f"{family:<42} {how:<39} max error {worst:.1e} of the standard deviation")
    # Gathering weights changes no number: what differs is the order in which split attention, or a LoRA's rows, sum.
    assert worst <= (TOLERANCE if sequence or patched else 0.0)
    assert not patched or ranks[0].effect > 0.02
    sharded = sum(rank.report.sharded_bytes for rank in ranks)
    whole = ranks[0].report.model_bytes
    assert sharded + ranks[0].report.replicated_bytes == whole
    for rank in ranks:
        assert rank.report.replicated_bytes <= 0.03 * whole
        assert rank.report.sharded_bytes <= 1.1 * whole / world
        assert rank.report.units == rank.blocks + 1
        if not sequence:
            assert rank.gathers == rank.report.units
