"""Hunyuan DiT 1.0 to 1.2."""

from __future__ import annotations

from typing import Any

import torch

from .family import Draw, Family
from .patched import patched, replaced_block

BASE = {
    "image_model": "hydit",
    "depth": 4,
    "hidden_size": 80,
    "num_heads": 5,
    "mlp_ratio": 2.0,
    "text_states_dim": 24,
    "text_states_dim_t5": 32,
    "text_len": 5,
    "text_len_t5": 6,
}


def text(draw: Draw) -> dict[str, Any]:
    mask, mask_t5 = torch.ones(2, 5), torch.ones(2, 6)
    mask[1, 3:] = mask_t5[0, 4:] = 0
    return {
        "x": draw(2, 4, 18, 14),
        "t": torch.tensor([700.0, 200.0]),
        "c_crossattn": draw(2, 5, 24),
        "text_embedding_mask": mask,
        "encoder_hidden_states_t5": draw(2, 6, 32),
        "text_embedding_mask_t5": mask_t5,
        "image_meta_size": torch.tensor([[144.0, 112.0, 144.0, 112.0, 0.0, 0.0]] * 2),
    }


def controlled(draw: Draw) -> dict[str, Any]:
    return text(draw) | {"control": {"output": [draw(2, 63, 80)]}}


FAMILIES = (
    Family(
        "Hunyuan DiT 1.2",
        "HunyuanDiT",
        BASE,
        {
            "text, batch of two": text,
            "ControlNet residuals": controlled,
            "replaced blocks": patched(text, {("double_block", 1): replaced_block}),
        },
    ),
    Family(
        "Hunyuan DiT 1.0",
        "HunyuanDiT1",
        BASE | {"image_model": "hydit1", "size_cond": True, "use_style_cond": True},
        {"text, batch of two": text},
    ),
)
