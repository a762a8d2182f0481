"""CogVideoX 1.0 and 1.5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .family import Draw, Family

BASE = {
    "image_model": "cogvideox",
    "num_attention_heads": 5,
    "attention_head_dim": 16,
    "time_embed_dim": 24,
    "num_layers": 2,
    "in_channels": 16,
    "patch_size": 2,
    "text_embed_dim": 24,
    "use_learned_positional_embeddings": False,
    "use_rotary_positional_embeddings": True,
}


def video(frames: int = 3, extra_channels: int = 0, batch: int = 1) -> Callable[[Draw], dict[str, Any]]:
    def call(draw: Draw) -> dict[str, Any]:
        inputs = {
            "x": draw(batch, 16, frames, 13, 18),
            "t": torch.tensor([700.0, 200.0][:batch]),
            "c_crossattn": draw(batch, 9, 24),
        }
        if extra_channels:
            inputs["c_concat"] = draw(batch, extra_channels, frames, 13, 18)
        return inputs

    return call


LEARNED = BASE | {
    "attention_head_dim": 24,
    "use_learned_positional_embeddings": True,
    "use_rotary_positional_embeddings": False,
}
V15 = BASE | {"patch_size_t": 2, "in_channels": 32, "ofs_embed_dim": 24}

FAMILIES = (
    Family("CogVideoX T2V", "CogVideoX_T2V", BASE, {"text": video(), "batch of two": video(batch=2)}),
    Family("CogVideoX T2V with learned positions", "CogVideoX_T2V", LEARNED, {"text": video()}),
    Family(
        "CogVideoX 1.5 I2V",
        "CogVideoX_I2V",
        V15,
        {"image": lambda draw: video(extra_channels=16)(draw) | {"ofs": torch.tensor([2.0])}},
    ),
    Family("CogVideoX Inpaint", "CogVideoX_Inpaint", BASE | {"in_channels": 48}, {"mask": video(extra_channels=32)}),
)
