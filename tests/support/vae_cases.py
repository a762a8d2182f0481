"""A VAE on ranks, in pieces of the width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raylight.dev.demo import comfy_server
from raylight.host.recipe import REPLICATED
from raylight.host.vae_file import map_vae
from raylight.host.vae_jobs import VaeRecipe
from raylight.parallel.process_group import of_all_ranks
from raylight.worker.patcher import mode_of
from raylight.worker.row_vae import RowVae

DEMO = Path(comfy_server.__file__).parent / "model" / "raylight-demo-vae.safetensors"
PIECES = 3


def latent_of(form: str) -> Tensor:
    shape = (2, 16, 6, 100) if form == "demo" else (1, 16, 3, 4, 100)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def pixels_of(form: str) -> Tensor:
    shape = (1, 48, 800, 3) if form == "demo" else (5, 32, 800, 3)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def in_pieces(rank: int, world: int, form: str, path: str, pieces: int) -> dict[str, Any]:
    """Return this rank's rows of what it decodes and encodes, and the widths of the pieces."""
    with mode_of(REPLICATED):
        vae = RowVae(map_vae(VaeRecipe.of_file(path, "float32")))
        vae.build_patcher()
        found: dict[str, Any] = {"decode": [], "widths": []}
        model: Any = vae.vae.first_stage_model
        decode = model.decode

        def noting(z: Tensor) -> Tensor:
            found["widths"].append(z.shape[-1])
            return decode(z)

        model.decode = noting
        latent = vae.latent_to_decode(latent_of(form))
        vae.expect(vae.vae.memory_used_decode, tuple(latent.shape))
        batch, planned = vae.pieces(pieces, latent.shape[-1] * vae.vae.spacial_compression_decode())
        assert planned == min(pieces, 3)  # a piece has 256 pixels at least

        def keep(_: int, rows: Tensor) -> None:
            found["decode"].append(vae.vae.process_output(rows))

        vae.decode(latent, batch, planned, {}, keep)
        found["decode"] = torch.cat(found["decode"])
        pixels = vae.pixels_to_encode(pixels_of(form))
        found["encode"] = vae.encode(pixels, 1, planned).numpy()
        found["heights"] = of_all_ranks(found["decode"].shape[-2])
        found["decode"] = found["decode"].numpy()  # a tensor would be gone with its rank
    return found
