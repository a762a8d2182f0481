"""Pieces of the width on ranks, for where memory is short: each as ComfyUI's own, and blended where they overlap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import pytest
import torch
from torch import Tensor
from vae_cases import DEMO, PIECES, in_pieces, latent_of, pixels_of
from vae_files import write_vae

from raylight.dev.local_ranks import run_ranks, values


@pytest.fixture(scope="module", params=["demo", "wan-narrow"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    form = request.param
    path = DEMO if form == "demo" else write_vae(tmp_path_factory.mktemp("vae") / "vae.safetensors", form)
    return form, path


def joined(answers: list[dict[str, Any]], what: str) -> Tensor:
    return torch.cat([torch.from_numpy(one[what]) for one in answers], dim=-2)


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.std()).item()


def test_pieces_of_the_width(case: tuple[str, Path]) -> None:
    form, path = case
    tensors, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    with torch.inference_mode():
        stock = comfy.sd.VAE(sd=tensors, metadata=metadata)
        picture = stock.decode(latent_of(form)).movedim(-1, 1)
        latent = stock.encode(pixels_of(form))
    whole = values(run_ranks(2, in_pieces, form, str(path), 1))
    assert set(whole[0]["widths"]) == {100}
    assert whole[0]["heights"] == [one["decode"].shape[-2] for one in whole]
    assert error(joined(whole, "decode"), picture) <= 1e-4
    assert error(joined(whole, "encode"), latent) <= 1e-4
    pieces = values(run_ranks(2, in_pieces, form, str(path), PIECES))
    widths = pieces[0]["widths"]
    assert len(widths) >= PIECES and max(widths) <= 40
    with torch.inference_mode():
        expected = tiled(stock, latent_of(form), widths[0])
    assert error(joined(pieces, "decode"), expected) <= 1e-4
    assert error(expected, picture) > 1e-3, "pieces see less than the whole"
    assert joined(pieces, "encode").shape == latent.shape


def tiled(stock: Any, samples: Tensor, width: int) -> Tensor:
    """What ComfyUI makes of tiles of this width and of the full height."""
    in_time = samples.ndim == 5
    decoded = comfy.utils.tiled_scale_multidim(
        samples,
        stock.first_stage_model.decode,
        tile=(*([samples.shape[2]] if in_time else []), samples.shape[-2], width),
        overlap=(*([0] if in_time else []), 0, 8),
        upscale_amount=stock.upscale_ratio,
        index_formulas=stock.upscale_index_formula,
    )
    return stock.process_output(decoded)
