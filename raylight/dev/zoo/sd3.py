"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any

import torch

from .family import Draw, Family
from .patched import patched, replaced_block

BASE = {
    "in_channels": 16,
    "patch_size": 2,
    "out_channels": 16,
    "depth": 5,
    "num_blocks": 3,
    "input_size": None,
    "adm_in_channels": 20,
    "pos_embed_scaling_factor": None,
    "qk_norm": "rms",
    "x_block_self_attn_layers": [],
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 24, "out_features": 320}},
}


def text(draw: Draw) -> dict[str, Any]:
    return {"x": draw(2, 16, 17, 13), "t": torch.tensor([0.7, 0.2]), "c_crossattn": draw(2, 7, 24), "y": draw(2, 20)}


def controlled(draw: Draw) -> dict[str, Any]:
    return text(draw) | {"control": {"output": [draw(2, 63, 320), None, draw(2, 63, 320)]}}


FAMILIES = (
    Family(
        "SD3",
        "SD3",
        BASE,
        {
            "text, batch of two": text,
            "ControlNet residuals": controlled,
            "replaced blocks": patched(text, {("double_block", 1): replaced_block}),
        },
    ),
    Family("SD3.5 Medium", "SD3", BASE | {"x_block_self_attn_layers": [0, 1]}, {"text, batch of two": text}),
)
