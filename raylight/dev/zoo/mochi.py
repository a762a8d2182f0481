"""Mochi."""

from __future__ import annotations

from typing import Any

import torch

from .family import Draw, Family
from .patched import patched, replaced_block

# ComfyUI asserts the width of the MLP.
BASE = {
    "image_model": "mochi_preview",
    "depth": 2,
    "patch_size": 2,
    "num_heads": 6,
    "hidden_size_x": 96,
    "hidden_size_y": 48,
    "mlp_ratio_x": 128.0,
    "mlp_ratio_y": 2.0,
    "learn_sigma": False,
    "in_channels": 12,
    "qk_norm": True,
    "qkv_bias": False,
    "out_bias": True,
    "attn_drop": 0.0,
    "patch_embed_bias": True,
    "posenc_preserve_area": True,
    "timestep_mlp_bias": True,
    "attend_to_padding": False,
    "timestep_scale": 1000.0,
    "use_t5": True,
    "t5_feat_dim": 24,
    "t5_token_length": 11,
    "rope_theta": 10000.0,
}


def padded_prompts(draw: Draw) -> dict[str, Any]:
    mask = torch.zeros(1, 11)
    mask[:, :5] = 1
    return {
        "x": draw(1, 12, 3, 14, 10),
        "t": torch.tensor([0.7]),
        "c_crossattn": draw(1, 11, 24),
        "attention_mask": mask,
        "num_tokens": 5,
    }


def batch_of_two(draw: Draw) -> dict[str, Any]:
    return {
        "x": draw(2, 12, 2, 10, 14),
        "t": torch.tensor([0.7, 0.2]),
        "c_crossattn": draw(2, 11, 24),
        "attention_mask": torch.ones(2, 11),
        "num_tokens": 22,
    }


FAMILIES = (
    Family(
        "Mochi",
        "GenmoMochi",
        BASE,
        {
            "padded prompt": padded_prompts,
            "batch of two": batch_of_two,
            "replaced blocks": patched(batch_of_two, {("double_block", 0): replaced_block}),
        },
    ),
)
