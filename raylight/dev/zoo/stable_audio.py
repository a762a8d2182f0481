"""Stable Audio 3."""

from __future__ import annotations

from typing import Any

import comfy.ldm.audio.embedders
import torch
from comfy.model_base import BaseModel

from .family import Draw, Family

BASE = {
    "audio_model": "dit1.0",
    "io_channels": 16,
    "embed_dim": 160,
    "cond_token_dim": 32,
    "project_cond_tokens": False,
    "global_cond_dim": 20,
    "num_heads": 5,
    "depth": 2,
    "num_memory_tokens": 6,
    "timestep_features_type": "expo",
    "attn_kwargs": {"qk_norm": "rms", "differential": True},
    "norm_type": "rms_norm",
    "global_cond_shared_embed": True,
    "global_cond_type": "adaLN",
    "local_add_cond_dim": 17,
    "input_concat_dim": 0,
}


def text(draw: Draw) -> dict[str, Any]:
    return {
        "x": draw(2, 16, 61),
        "t": torch.tensor([0.7, 0.2]),
        "c_crossattn": draw(2, 9, 32),
        "global_embed": draw(2, 20),
        "local_add_cond": draw(2, 17, 61),
    }


def embedder_weights() -> dict[str, torch.Tensor]:
    """Return weights of the embedder of durations, which model files also contain."""
    embedder = comfy.ldm.audio.embedders.NumberConditioner(768, min_val=0, max_val=384, fourier_features_type="expo")
    prefix = "conditioner.conditioners.seconds_total."
    return {prefix + name: value for name, value in embedder.state_dict().items()}


def set_frequencies(model: BaseModel) -> None:
    """Set a buffer that model files contain."""
    for module in model.diffusion_model.modules():
        if hasattr(module, "inv_freq"):
            module.inv_freq.copy_(torch.linspace(1.0, 0.01, module.inv_freq.shape[0]))


FAMILIES = (
    Family(
        "Stable Audio 3",
        "StableAudio3",
        BASE,
        {"text, batch of two": text},
        prepare=set_frequencies,
        weights=embedder_weights,
        since="0.27.0",
    ),  # 0.24 has it, but not for grouped queries
)
