"""LTX-Video and LTX-2."""

from __future__ import annotations

from typing import Any

import torch

from .family import Draw, Family
from .patched import patched, replaced_block

BASE = {
    "image_model": "ltxv",
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 5,
    "in_channels": 16,
    "cross_attention_dim": 80,
    "caption_channels": 24,
    "causal_temporal_positioning": True,
    "vae_scale_factors": (8, 32, 32),
}
AUDIO = BASE | {
    "image_model": "ltxav",
    "audio_in_channels": 128,
    "audio_cross_attention_dim": 60,
    "audio_attention_head_dim": 12,
    "audio_num_attention_heads": 5,
    "connector_num_layers": 1,
    "connector_attention_head_dim": 16,
    "connector_num_attention_heads": 2,
}


def text(draw: Draw) -> dict[str, Any]:
    return {
        "x": draw(2, 16, 3, 7, 9),
        "t": torch.tensor([0.7, 0.2]),
        "c_crossattn": draw(2, 11, 24),
        "frame_rate": 25,
        "attention_mask": None,
    }


def padded_prompts(draw: Draw) -> dict[str, Any]:
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, 6:] = 0
    return text(draw) | {"attention_mask": mask}


def first_frame_kept(draw: Draw) -> dict[str, Any]:
    mask = torch.ones(2, 1, 3, 7, 9)
    mask[:, :, 0] = 0.1
    return text(draw) | {"denoise_mask": mask}


def inpainted(draw: Draw) -> dict[str, Any]:
    mask = torch.ones(2, 1, 3, 7, 9)
    mask[:, :, 1, 2:5, 3:] = 0.3
    return text(draw) | {"denoise_mask": mask}


def with_guide(draw: Draw) -> dict[str, Any]:
    """Make the last frame a guide of strength 0.5, so that attention to and from it is attenuated."""
    return first_frame_kept(draw) | {
        "keyframe_idxs": draw(2, 3, 63, 2).abs() * 8,
        "guide_attention_entries": [{"pre_filter_count": 63, "strength": 0.5, "latent_shape": (1, 7, 9)}],
    }


def packed(call: Any, audio: bool = True) -> Any:
    def made(draw: Draw) -> dict[str, Any]:
        inputs = call(draw)
        latents = [inputs["x"], draw(2, 8, 13, 16)] if audio else [inputs["x"]]
        # ComfyUI packs several latents into one, and leaves one as it is.
        x = torch.cat([latent.reshape(2, 1, -1) for latent in latents], dim=-1) if audio else inputs["x"]
        return inputs | {"x": x, "latent_shapes": [x.shape for x in latents], "c_crossattn": draw(2, 11, 48)}

    return made


FAMILIES = (
    Family(
        "LTX-Video",
        "LTXV",
        BASE,
        {
            "text, batch of two": text,
            "padded prompts": padded_prompts,
            "timestep per token": first_frame_kept,
            "guide with attenuated attention": with_guide,
            "replaced blocks": patched(text, {("double_block", 0): replaced_block}),
        },
    ),
    Family(
        "LTX-2",
        "LTXAV",
        AUDIO,
        {
            "video and audio, batch of two": packed(text),
            "timestep per frame": packed(first_frame_kept),
            "timestep per token": packed(inpainted),
            "video only": packed(text, audio=False),
            "guide with attenuated attention": packed(with_guide),
        },
    ),
)
