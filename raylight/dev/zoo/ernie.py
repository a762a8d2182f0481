"""Ernie Image."""

from __future__ import annotations

from typing import Any

import torch

from .family import Draw, Family

BASE = {
    "image_model": "ernie",
    "hidden_size": 80,
    "num_attention_heads": 5,
    "num_layers": 2,
    "ffn_hidden_size": 96,
    "in_channels": 128,
    "out_channels": 128,
    "text_in_dim": 24,
    "rope_axes_dim": (4, 6, 6),
}


def text(draw: Draw) -> dict[str, Any]:
    return {"x": draw(2, 128, 9, 7), "t": torch.tensor([0.7, 0.2]), "c_crossattn": draw(2, 7, 24)}


FAMILIES = (Family("Ernie Image", "ErnieImage", BASE, {"text, batch of two": text}),)
