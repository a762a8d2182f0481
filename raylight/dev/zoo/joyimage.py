"""JoyImage Edit."""

from __future__ import annotations

from typing import Any

import torch

from .family import Draw, Family
from .patched import patched, replaced_block

BASE = {
    "image_model": "joyimage",
    "patch_size": [1, 2, 2],
    "in_channels": 16,
    "out_channels": 16,
    "hidden_size": 80,
    "num_attention_heads": 5,
    "text_dim": 24,
    "mlp_width_ratio": 2.0,
    "num_layers": 2,
    "rope_dim_list": [4, 6, 6],
}


def text(draw: Draw) -> dict[str, Any]:
    return {"x": draw(2, 16, 1, 17, 13), "t": torch.tensor([0.7, 0.2]), "c_crossattn": draw(2, 7, 24)}


def references(draw: Draw) -> dict[str, Any]:
    return text(draw) | {"ref_latents": [draw(2, 16, 1, 9, 8), draw(2, 16, 1, 6, 5)]}


FAMILIES = (
    Family(
        "JoyImage Edit",
        "JoyImage",
        BASE,
        {
            "text, batch of two": text,
            "references": references,
            "replaced blocks": patched(references, {("double_block", 0): replaced_block}),
        },
        since="0.30.0",
    ),
)
