"""HiDream."""

from __future__ import annotations

from typing import Any

import torch

from .family import Draw, Family

BASE = {
    "image_model": "hidream",
    "attention_head_dim": 16,
    "axes_dims_rope": [4, 6, 6],
    "caption_channels": [24, 28],
    "max_resolution": [128, 128],
    "in_channels": 16,
    "llama_layers": [0, 1, 1, 2],
    "num_attention_heads": 5,
    "num_routed_experts": 3,
    "num_activated_experts": 2,
    "num_layers": 2,
    "num_single_layers": 2,
    "out_channels": 16,
    "patch_size": 2,
    "text_emb_dim": 20,
}


def text(draw: Draw) -> dict[str, Any]:
    return {
        "x": draw(2, 16, 17, 13),
        "t": torch.tensor([0.7, 0.2]),
        "c_crossattn": draw(2, 7, 24),
        "y": draw(2, 20),
        "encoder_hidden_states_llama3": draw(2, 3, 5, 28),
    }


def image(draw: Draw) -> dict[str, Any]:
    return text(draw) | {"image_cond": draw(2, 16, 17, 13)}


FAMILIES = (Family("HiDream", "HiDream", BASE, {"text, batch of two": text, "image to edit": image}),)
