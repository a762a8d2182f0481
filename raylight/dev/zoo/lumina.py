"""Lumina 2, Z-Image and Z-Image in pixel space."""

from __future__ import annotations

from typing import Any

import torch

from .family import Draw, Family
from .patched import after_block, patched

BASE = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 96,
    "cap_feat_dim": 24,
    "n_layers": 2,
    "qk_norm": True,
    "n_heads": 6,
    "n_kv_heads": 3,
    "axes_dims": [4, 6, 6],
    "axes_lens": [300, 512, 512],
    "rope_theta": 10000.0,
    "ffn_dim_multiplier": 1.0,
}
Z_IMAGE = BASE | {
    "dim": 288,
    "axes_dims": [16, 16, 16],
    "n_kv_heads": 6,
    "rope_theta": 256.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
PIXELS = Z_IMAGE | {
    "image_model": "zimage_pixel",
    "patch_size": 4,
    "in_channels": 3,
    "decoder_hidden_size": 32,
    "decoder_num_res_blocks": 1,
    "decoder_max_freqs": 4,
}


def text(draw: Draw) -> dict[str, Any]:
    return {"x": draw(2, 16, 17, 13), "t": torch.tensor([0.7, 0.2]), "c_crossattn": draw(2, 7, 24), "num_tokens": 7}


def omni(draw: Draw) -> dict[str, Any]:
    return {
        "x": draw(1, 16, 17, 13),
        "t": torch.tensor([0.7]),
        "c_crossattn": draw(1, 7, 24),
        "num_tokens": 7,
        "ref_latents": [draw(1, 16, 8, 10), draw(1, 16, 6, 12)],
        "ref_contexts": [draw(1, 9, 24), draw(1, 4, 24)],
    }


def pixels(draw: Draw) -> dict[str, Any]:
    return text(draw) | {"x": draw(2, 3, 30, 26)}


def after_layer(arguments: dict[str, Any]) -> dict[str, Any]:
    """Patch copies as `after_block` does: Lumina passes its patches views of the joint tokens."""
    return after_block(arguments | {name: arguments[name].clone() for name in ("img", "txt")})


FAMILIES = (
    Family("Lumina 2", "Lumina2", BASE, {"text, batch of two": text}),
    Family(
        "Z-Image",
        "ZImage",
        Z_IMAGE,
        {
            "text, batch of two": text,
            "references": omni,
            "patches after blocks": patched(text, double_block=after_layer, noise_refiner=after_layer),
        },
    ),
    Family(
        "Z-Image in pixel space",
        "ZImagePixelSpace",
        PIXELS,
        {"pixels, batch of two": pixels, "patch after blocks": patched(pixels, double_block=after_layer)},
    ),
)
