"""PixArt Alpha and Sigma."""

from __future__ import annotations

from typing import Any

import torch

from .family import Draw, Family

BASE = {
    "input_size": 32,
    "hidden_size": 60,
    "depth": 2,
    "num_heads": 5,
    "mlp_ratio": 2.0,
    "caption_channels": 24,
    "model_max_length": 9,
    "micro_condition": False,
    "pe_interpolation": 1,
    "image_model": "pixart_sigma",
}
ALPHA = BASE | {"image_model": "pixart_alpha", "micro_condition": True}


def text(draw: Draw) -> dict[str, Any]:
    return {"x": draw(2, 4, 38, 30), "t": torch.tensor([700.0, 200.0]), "c_crossattn": draw(2, 9, 24)}


def sized(draw: Draw) -> dict[str, Any]:
    return text(draw) | {"c_size": torch.tensor([[304.0, 240.0]] * 2), "c_ar": torch.tensor([[1.3]] * 2)}


FAMILIES = (
    Family("PixArt Sigma", "PixArtSigma", BASE, {"text, batch of two": text}),
    Family("PixArt Alpha", "PixArtAlpha", ALPHA, {"text with sizes, batch of two": sized}),
)
