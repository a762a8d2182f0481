"""Wan 2.1 and 2.2."""

from __future__ import annotations

from typing import Any

import torch

from .family import Draw, Family, since
from .patched import after_block, on_attention, patched, replaced_block

BASE = {
    "image_model": "wan2.1",
    "dim": 96,
    "ffn_dim": 128,
    "num_heads": 6,
    "num_layers": 2,
    "patch_size": (1, 2, 2),
    "freq_dim": 32,
    "text_dim": 24,
    "out_dim": 16,
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
}


def text_to_video(draw: Draw) -> dict[str, Any]:
    return {"x": draw(1, 16, 3, 14, 18), "t": torch.tensor([0.7]), "c_crossattn": draw(1, 11, 24)}


def batch_of_two(draw: Draw) -> dict[str, Any]:
    return {"x": draw(2, 16, 2, 13, 11), "t": torch.tensor([0.7, 0.3]), "c_crossattn": draw(2, 7, 24)}


def image_to_video(draw: Draw) -> dict[str, Any]:
    return {
        "x": draw(1, 16, 3, 10, 14),
        "t": torch.tensor([0.6]),
        "c_crossattn": draw(1, 9, 24),
        "c_concat": draw(1, 20, 3, 10, 14),
        "clip_fea": draw(1, 257, 1280),
    }


FAMILIES = (
    Family(
        "Wan T2V",
        "WAN21_T2V",
        BASE | {"model_type": "t2v", "in_dim": 16},
        {
            "text": text_to_video,
            "batch of two, odd size": batch_of_two,
            **since("0.30.0", {"patch after blocks": patched(text_to_video, double_block=after_block)}),
            "replaced blocks": patched(
                text_to_video, {("double_block", 0): replaced_block, ("double_block", 1): replaced_block}
            ),
            "attention patches": patched(text_to_video, attn1_patch=on_attention, attn2_patch=on_attention),
        },
    ),
    Family("Wan I2V", "WAN21_I2V", BASE | {"model_type": "i2v", "in_dim": 36}, {"image": image_to_video}),
)
