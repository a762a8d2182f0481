"""Ideogram 4."""

from __future__ import annotations

from typing import Any

import torch

from .family import Draw, Family

BASE = {
    "image_model": "ideogram4",
    "in_channels": 128,
    "num_layers": 2,
    "num_attention_heads": 5,
    "attention_head_dim": 16,
    "intermediate_size": 96,
    "adaln_dim": 32,
    "llm_features_dim": 24,
    "mrope_section": [4, 2, 2],
}


def text(draw: Draw) -> dict[str, Any]:
    return {"x": draw(2, 128, 9, 7), "t": torch.tensor([0.7, 0.2]), "c_crossattn": draw(2, 7, 24)}


def padded_prompts(draw: Draw) -> dict[str, Any]:
    mask = torch.ones(2, 7)
    mask[1, 4:] = 0
    return text(draw) | {"attention_mask": mask}


def image_only(draw: Draw) -> dict[str, Any]:
    return {"x": draw(1, 128, 9, 7), "t": torch.tensor([0.7])}


FAMILIES = (
    Family(
        "Ideogram 4",
        "Ideogram4",
        BASE,
        {"text, batch of two": text, "padded prompts": padded_prompts, "without text": image_only},
    ),
)
