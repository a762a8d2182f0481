"""TripoSplat."""

from __future__ import annotations

from typing import Any

import torch

from .family import Draw, Family

BASE = {
    "image_model": "triposplat",
    "q_token_length": 61,
    "model_channels": 120,
    "cond_channels": 24,
    "num_blocks": 2,
    "num_refiner_blocks": 2,
    "num_head_channels": 24,
    "cond2_channels": 20,
}


def image(draw: Draw) -> dict[str, Any]:
    latents = [draw(1, 61, 16), draw(1, 1, 5)]
    return {
        "x": torch.cat([latent.reshape(1, 1, -1) for latent in latents], dim=-1),
        "t": torch.tensor([0.7]),
        "latent_shapes": [latent.shape for latent in latents],
        "c_crossattn": draw(1, 13, 24),
        "ref_latents": [draw(1, 20, 3, 4)],
    }


FAMILIES = (Family("TripoSplat", "TripoSplat", BASE, {"image": image}),)
