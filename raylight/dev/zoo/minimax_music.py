"""MiniMax Music 3. No configuration sets its width, so its layers are replaced by narrow ones of the same classes."""

from __future__ import annotations

from typing import Any

import comfy.ops
import torch
from comfy.model_base import BaseModel
from torch import nn

from .family import Draw, Family

WIDTH, HEAD_WIDTH, LAYERS = 320, 64, 2
MADE = {"dtype": torch.float32, "device": "cpu"}
OPERATIONS = comfy.ops.disable_weight_init


def narrow(model: BaseModel) -> None:
    """Give the transformer 5 heads instead of 32, and 2 layers instead of 36."""
    from comfy.ldm.minimax_music.dit import TransformerBlock

    dit = model.diffusion_model.diffusion_transformer
    features = dit.to_timestep_embed[0].in_features
    dit.to_timestep_embed = nn.Sequential(
        OPERATIONS.Linear(features, WIDTH, **MADE), nn.SiLU(), OPERATIONS.Linear(WIDTH, WIDTH, **MADE)
    )
    transformer = dit.transformer
    transformer.project_in = OPERATIONS.Linear(transformer.project_in.in_features, WIDTH, bias=False, **MADE)
    transformer.project_out = OPERATIONS.Linear(WIDTH, transformer.project_out.out_features, bias=False, **MADE)
    transformer.layers = nn.ModuleList(
        TransformerBlock(WIDTH, HEAD_WIDTH, 2 * WIDTH, operations=OPERATIONS, **MADE) for _ in range(LAYERS)
    )


@torch.no_grad()
def set_norms(model: BaseModel) -> None:
    """Set buffers that model files contain, and scales of norms near to 1."""
    dit = model.diffusion_model
    frequencies = dit.diffusion_transformer.transformer.rotary_pos_emb.inv_freq
    frequencies.copy_(torch.linspace(1.0, 0.01, frequencies.shape[0]))
    for module in dit.modules():
        if hasattr(module, "beta"):
            module.beta.zero_()
            module.gamma.add_(1.0)


def song(draw: Draw) -> dict[str, Any]:
    return {
        "x": draw(2, 128, 51),
        "t": torch.tensor([0.7, 0.2]),
        "c_crossattn": draw(2, 15, 8 * 4096),
        "conditioning_scale": torch.tensor([1.0, 0.5]).view(2, 1, 1),
    }


def long_song(draw: Draw) -> dict[str, Any]:
    """Return arguments for more audio than a window has, 689 tokens, so that there are two, of unlike lengths."""
    return {
        "x": draw(1, 128, 731),
        "t": torch.tensor([0.7]),
        "c_crossattn": draw(1, 215, 8 * 4096),
        "conditioning_scale": torch.ones(1, 1, 1),
    }


FAMILIES = (
    Family(
        "MiniMax Music 3",
        "MiniMaxMusic3",
        {"audio_model": "minimax_music3"},
        {"text, batch of two": song, "longer than a window": long_song},
        prepare=set_norms,
        trim=narrow,
        since="0.33.0",
    ),
)
