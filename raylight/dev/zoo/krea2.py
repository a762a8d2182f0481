"""Krea 2."""

from __future__ import annotations

from typing import Any

import torch

from .family import Draw, Family
from .patched import after_attention, before_attention, patched

BASE = {
    "image_model": "krea2",
    "features": 96,
    "channels": 16,
    "patch": 2,
    "layers": 2,
    "heads": 6,
    "kvheads": 3,
    "txtlayers": 3,
    "txtdim": 24,
    "txtheads": 4,
    "txtkvheads": 4,
    "tdim": 32,
    "multiplier": 2,
}


def text(draw: Draw) -> dict[str, Any]:
    return {"x": draw(2, 16, 17, 13), "t": torch.tensor([0.7, 0.2]), "c_crossattn": draw(2, 7, 72)}


def references(method: str) -> Any:
    def call(draw: Draw) -> dict[str, Any]:
        return text(draw) | {"ref_latents": [draw(2, 16, 9, 8), draw(2, 16, 6, 5)], "ref_latents_method": method}

    return call


FAMILIES = (
    Family(
        "Krea 2",
        "Krea2",
        BASE,
        {
            "text, batch of two": text,
            "references": references("index"),
            "references at time zero": references("index_timestep_zero"),
            "attention patches": patched(text, attn1_patch=before_attention, attn1_output_patch=after_attention),
        },
        since="0.30.0",
    ),
)
