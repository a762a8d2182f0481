"""Hunyuan 3D 2.0, mini and 2.1."""

from __future__ import annotations

from typing import Any

import torch

from .family import Draw, Family
from .patched import before_attention, patched, replaced_block

BASE = {
    "image_model": "hunyuan3d2",
    "in_channels": 16,
    "context_in_dim": 24,
    "hidden_size": 80,
    "mlp_ratio": 2.0,
    "num_heads": 5,
    "depth": 2,
    "depth_single_blocks": 2,
    "qkv_bias": True,
    "guidance_embed": True,
}
V21 = {
    "image_model": "hunyuan3d2_1",
    "in_channels": 16,
    "context_dim": 24,
    "hidden_size": 80,
    "num_heads": 5,
    "depth": 4,
    "qkv_bias": False,
    "guidance_cond_proj_dim": None,
    "num_moe_layers": 2,
    "num_experts": 3,
    "moe_top_k": 2,
}


def shape(draw: Draw) -> dict[str, Any]:
    return {"x": draw(2, 16, 61), "t": torch.tensor([0.7, 0.2]), "c_crossattn": draw(2, 9, 24)}


def with_guidance(draw: Draw) -> dict[str, Any]:
    return shape(draw) | {"guidance": torch.tensor([5.0, 5.0])}


FAMILIES = (
    Family(
        "Hunyuan 3D 2.0",
        "Hunyuan3Dv2",
        BASE,
        {
            "image, batch of two": with_guidance,
            "replaced blocks": patched(
                with_guidance, {("double_block", 0): replaced_block, ("single_block", 1): replaced_block}
            ),
            "attention patch": patched(with_guidance, attn1_patch=before_attention),
        },
    ),
    Family(
        "Hunyuan 3D 2.0 mini",
        "Hunyuan3Dv2mini",
        BASE | {"depth": 1, "guidance_embed": False},
        {"image, batch of two": shape},
    ),
    Family("Hunyuan 3D 2.1", "Hunyuan3Dv2_1", V21, {"image, batch of two": shape}),
)
