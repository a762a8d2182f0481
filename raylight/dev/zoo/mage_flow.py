"""Mage-Flow."""

from __future__ import annotations

from typing import Any

import torch

from .family import Draw, Family
from .patched import joint_patches

BASE = {
    "image_model": "mage_flow",
    "in_channels": 128,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 5,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}


def text(draw: Draw) -> dict[str, Any]:
    return {"x": draw(2, 128, 9, 7), "t": torch.tensor([0.7, 0.2]), "c_crossattn": draw(2, 7, 24)}


def references(draw: Draw) -> dict[str, Any]:
    return text(draw) | {"ref_latents": [draw(2, 128, 5, 4), draw(2, 128, 3, 7)]}


FAMILIES = (
    Family(
        "Mage-Flow",
        "MageFlow",
        BASE,
        {
            "text, batch of two": text,
            "references": references,
            **joint_patches(text, single_blocks=False, after_blocks=True),
        },
        since="0.30.0",
    ),
)
