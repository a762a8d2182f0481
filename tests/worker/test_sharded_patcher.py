"""Quantised checkpoints with their weights split over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from loaded_cases import Loaded, compare_loaded
from quantised import FORMATS, gathered_bytes, quantise
from safetensors.torch import load_file

from raylight.dev.demo.tiny import write_checkpoint
from raylight.dev.local_ranks import run_ranks, values

HEADS = 4  # one format wants widths that divide by 256


@dataclass(frozen=True)
class Measured:
    """What the ranks measured of a file, and the bytes that they gather if these are the file's."""

    ranks: list[Loaded]
    stored_bytes: int


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantised")


@pytest.fixture(scope="module")
def measured(folder: Path) -> dict[tuple[str, int, bool], Measured]:
    write_checkpoint(folder / "plain.safetensors", "wan-t2v", heads=HEADS)
    paths = tuple(folder / f"{index}.safetensors" for index in range(len(FORMATS)))
    for form, path in zip(FORMATS, paths, strict=True):
        quantise(folder / "plain.safetensors", path, form)
    results = {}
    for world, offload in ((2, False), (3, True)):
        ranks = values(run_ranks(world, compare_loaded, paths, offload, timeout_s=300))
        for index, form in enumerate(FORMATS):
            stored = gathered_bytes(paths[index], world)
            results[form, world, offload] = Measured([rank[index] for rank in ranks], stored)
    return results


@pytest.mark.parametrize(("world", "offload"), [(2, False), (3, True)])
@pytest.mark.parametrize("form", FORMATS)
def test_sharded_quantised_weights_give_what_full_ones_give(
    form: str, world: int, offload: bool, measured, report_parity
) -> None:
    ranks = measured[form, world, offload].ranks
    full = ranks[0].model_bytes
    worst = max(rank.error for rank in ranks)
    report_parity(
        f"Wan T2V, {form:<33} FSDP {world}{' offloaded' if offload else '':<22} max error {worst:.1e} of the "
        f"standard deviation"
    )
    assert worst == 0.0
    assert sum(rank.sharded_bytes for rank in ranks) + ranks[0].replicated_bytes == full
    assert max(rank.sharded_bytes + rank.replicated_bytes for rank in ranks) <= 1.05 * full / world


@pytest.mark.parametrize(("world", "offload"), [(2, False), (3, True)])
@pytest.mark.parametrize("form", FORMATS)
def test_what_is_gathered_is_as_small_as_in_the_file(form: str, world: int, offload: bool, measured) -> None:
    found = measured[form, world, offload]
    for rank in found.ranks:
        assert rank.gathered_bytes == found.stored_bytes
        assert rank.sent_bytes == found.stored_bytes // world


def test_fp8_without_scales_is_gathered_as_fp8(measured, folder) -> None:
    path = folder / "plain.safetensors"
    # ComfyUI keeps this one in float32.
    stored = gathered_bytes(path, 2, torch.float8_e4m3fn) + 3 * load_file(path)["patch_embedding.weight"].numel()
    for rank in values(run_ranks(2, compare_loaded, (path,), True, torch.float8_e4m3fn, timeout_s=300)):
        assert rank[0].error == 0.0
        assert rank[0].gathered_bytes == stored
