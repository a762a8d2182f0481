"""PixelDiT and PiD."""

from __future__ import annotations

from typing import Any

import torch

from .family import Draw, Family, since

BASE = {
    "image_model": "pixeldit_t2i",
    "num_groups": 5,
    "hidden_size": 80,
    "pixel_hidden_size": 8,
    "pixel_attn_hidden_size": 48,
    "pixel_num_groups": 4,
    "patch_depth": 2,
    "pixel_depth": 1,
    "txt_embed_dim": 24,
    "txt_max_length": 20,
}
PID = BASE | {
    "image_model": "pid",
    "patch_depth": 4,
    "lq_hidden_dim": 16,
    "lq_num_res_blocks": 1,
    "lq_interval": 2,
    **since("0.30.0", {"pit_lq_inject": True}),
}


def text(draw: Draw) -> dict[str, Any]:
    return {"x": draw(2, 3, 140, 110), "t": torch.tensor([0.7, 0.2]), "c_crossattn": draw(2, 7, 24)}


def upscaled(draw: Draw) -> dict[str, Any]:
    return text(draw) | {"lq_latent": draw(2, 16, 5, 4), "degrade_sigma": torch.tensor([0.3, 0.3])}


FAMILIES = (
    Family("PixelDiT", "PixelDiTT2I", BASE, {"text, batch of two": text}),
    Family("PiD", "PiD", PID, {"image, batch of two": upscaled}),
)
