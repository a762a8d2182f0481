"""Lens."""

from __future__ import annotations

from typing import Any

import torch

from .family import Draw, Family
from .patched import after_block, patched, replaced_block

BASE = {
    "image_model": "lens",
    "in_channels": 128,
    "out_channels": 32,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 5,
    "enc_hidden_dim": 12,
    "axes_dims_rope": (4, 6, 6),
    "multi_layer_encoder_feature": True,
    "selected_layer_index": (0, 1),
}


def text(draw: Draw) -> dict[str, Any]:
    return {"x": draw(1, 128, 9, 7), "t": torch.tensor([0.7]), "c_crossattn": draw(1, 7, 24)}


def padded_prompts(draw: Draw) -> dict[str, Any]:
    mask = torch.ones(2, 7)
    mask[1, 4:] = 0
    return {
        "x": draw(2, 128, 8, 7),
        "t": torch.tensor([0.7, 0.2]),
        "c_crossattn": draw(2, 7, 24),
        "attention_mask": mask,
    }


def controlled(draw: Draw) -> dict[str, Any]:
    return text(draw) | {"control": {"input": [draw(1, 63, 80), draw(1, 40, 80)]}}


FAMILIES = (
    Family(
        "Lens",
        "Lens",
        BASE,
        {
            "text": text,
            "padded prompts, batch of two": padded_prompts,
            "ControlNet residuals": controlled,
            "patch after blocks": patched(text, double_block=after_block),
            "replaced blocks": patched(text, {("double_block", 0): replaced_block}),
        },
    ),
)
