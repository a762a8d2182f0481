"""MiniMax H3."""

from __future__ import annotations

from typing import Any

import torch
from comfy.model_base import BaseModel

from .family import Draw, Family, since
from .patched import patched

BASE = {
    "image_model": "minimax_h3",
    "num_layers": 2,
    "token_refiner_num_layers": 1,
    "hidden_size": 80,
    "latents_dim": 24,
    "audio_latents_dim": 32,
    "attention_head_dim": 16,
    "num_attention_heads": 5,
    "ffn_hidden_size": 96,
    "text_dim": 24,
    "timestep_input_dim": 32,
    "time_embed_hidden_size": 48,
    "time_embed_dim": 40,
    "rope_inv_freq_len": 2,
}


def video_and_audio(draw: Draw) -> dict[str, Any]:
    latents = [draw(1, 24, 3, 10, 14), draw(1, 32, 2, 9)]
    return {
        "x": torch.cat([latent.reshape(1, 1, -1) for latent in latents], dim=-1),
        "t": torch.tensor([0.7]),
        "latent_shapes": [latent.shape for latent in latents],
        "c_crossattn": draw(1, 7, 24),
    }


def mixed_text(draw: Draw) -> dict[str, Any]:
    """Put vision tokens, which are modulated like video, into the text."""
    return video_and_audio(draw) | {"minimax_payload": {"text_token_tags": torch.tensor([1, 1, 0, 0, 0, 1, 1])}}


def masked(draw: Draw) -> dict[str, Any]:
    """Generate some of the video and of the audio: each of their tokens has a modulation of its own."""
    video, audio = torch.ones(1, 1, 3, 10, 14), torch.ones(1, 1, 2, 9)
    video[:, :, 0], video[:, :, 1, 3:, :5], audio[..., 4:] = 0.0, 0.4, 0.3
    return video_and_audio(draw) | {"denoise_mask": video, "audio_denoise_mask": audio}


def scaled_block(arguments: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Replace a `dit` block; tokens are (S, width) here."""
    out = more["original_block"](arguments | {"img": arguments["img"].flip(0)})["img"]
    return {"img": out + out.mean(0)}


def set_frequencies(model: BaseModel) -> None:
    """Set a buffer that model files contain."""
    model.diffusion_model.rope.inv_freq.copy_(torch.tensor([1.0, 0.1]))


FAMILIES = (
    Family(
        "MiniMax H3",
        "MiniMaxH3",
        BASE,
        {
            "video and audio": video_and_audio,
            "vision tokens in the text": mixed_text,
            **since("0.33.0", {"masked video and audio": masked}),
            "replaced blocks": patched(video_and_audio, {("double_block", 0): scaled_block}),
        },
        prepare=set_frequencies,
        since="0.30.0",
    ),
)
