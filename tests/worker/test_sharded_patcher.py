"""Quantised checkpoints with their weights split over ranks."""

from __future__ import annotations

import pytest
from loaded_cases import Loaded, compare_loaded
from quantised import FORMATS, quantise

from raylight.dev.demo.tiny import write_checkpoint
from raylight.dev.local_ranks import run_ranks, values

HEADS = 4  # one format wants widths that divide by 256


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, bool], list[Loaded]]:
    folder = tmp_path_factory.mktemp("quantised")
    write_checkpoint(folder / "plain.safetensors", "wan-t2v", heads=HEADS)
    paths = tuple(folder / f"{index}.safetensors" for index in range(len(FORMATS)))
    for form, path in zip(FORMATS, paths, strict=True):
        quantise(folder / "plain.safetensors", path, form)
    results = {}
    for world, offload in ((2, False), (3, True)):
        ranks = values(run_ranks(world, compare_loaded, paths, offload, timeout_s=300))
        for index, form in enumerate(FORMATS):
            results[form, world, offload] = [rank[index] for rank in ranks]
    return results


@pytest.mark.parametrize(("world", "offload"), [(2, False), (3, True)])
@pytest.mark.parametrize("form", FORMATS)
def test_sharded_quantised_weights_give_what_full_ones_give(
    form: str, world: int, offload: bool, measured, report_parity
) -> None:
    ranks = measured[form, world, offload]
    full = ranks[0].model_bytes
    worst = max(rank.error for rank in ranks)
    report_parity(
        f"Wan T2V, {form:<33} FSDP {world}{' offloaded' if offload else '':<22} max error {worst:.1e} of the "
        f"standard deviation"
    )
    assert worst == 0.0
    assert sum(rank.sharded_bytes for rank in ranks) + ranks[0].replicated_bytes == full
    assert max(rank.sharded_bytes + rank.replicated_bytes for rank in ranks) <= 1.05 * full / world
