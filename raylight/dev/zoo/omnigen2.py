"""OmniGen 2 and Boogu."""

from __future__ import annotations

from typing import Any

import torch

from .family import Draw, Family

BASE = {
    "image_model": "omnigen2",
    "axes_dim_rope": [4, 6, 6],
    "axes_lens": [1024, 1664, 1664],
    "ffn_dim_multiplier": None,
    "hidden_size": 96,
    "in_channels": 16,
    "multiple_of": 16,
    "norm_eps": 1e-05,
    "num_attention_heads": 6,
    "num_kv_heads": 3,
    "num_layers": 2,
    "num_refiner_layers": 2,
    "out_channels": None,
    "patch_size": 2,
    "text_feat_dim": 24,
    "timestep_scale": 1000.0,
}
BOOGU = {key: value for key, value in BASE.items() if key != "text_feat_dim"} | {
    "image_model": "boogu",
    "num_double_stream_layers": 2,
    "instruction_feat_dim": 24,
}


def text(draw: Draw) -> dict[str, Any]:
    return {"x": draw(2, 16, 17, 13), "t": torch.tensor([0.7, 0.2]), "c_crossattn": draw(2, 7, 24), "num_tokens": 7}


def references(draw: Draw) -> dict[str, Any]:
    return text(draw) | {
        "x": draw(1, 16, 17, 13),
        "t": torch.tensor([0.7]),
        "c_crossattn": draw(1, 7, 24),
        "ref_latents": [draw(1, 16, 9, 8), draw(1, 16, 6, 5)],
    }


CALLS = {"text, batch of two": text, "references": references}

FAMILIES = (Family("OmniGen 2", "Omnigen2", BASE, CALLS), Family("Boogu", "Boogu", BOOGU, CALLS, since="0.27.0"))
