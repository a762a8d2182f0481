"""Chroma and Chroma Radiance."""

from __future__ import annotations

from typing import Any

import torch

from .family import Draw, Family
from .patched import joint_patches

BASE = {
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "context_in_dim": 24,
    "hidden_size": 80,
    "mlp_ratio": 2.0,
    "num_heads": 5,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [4, 6, 6],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "in_dim": 64,
    "out_dim": 80,
    "hidden_dim": 48,
    "n_layers": 2,
    "txt_ids_dims": [],
    "vec_in_dim": None,
}
RADIANCE = BASE | {
    "image_model": "chroma_radiance",
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": 16,
    "nerf_hidden_size": 16,
    "nerf_mlp_ratio": 2,
    "nerf_depth": 2,
    "nerf_max_freqs": 4,
    "nerf_tile_size": 512,
    "nerf_final_head_type": "conv",
    "nerf_embedder_dtype": torch.float32,
    "use_x0": False,
    "use_sequential_txt_ids": True,
}


def latent(draw: Draw) -> dict[str, Any]:
    return {
        "x": draw(1, 16, 18, 22),
        "t": torch.tensor([0.7]),
        "c_crossattn": draw(1, 9, 24),
        "guidance": torch.tensor([0.0]),
    }


def padded_prompts(draw: Draw) -> dict[str, Any]:
    tokens = 7 + 9 * 7
    mask = torch.zeros(2, 1, 1, tokens)
    mask[1, ..., 4:7] = -1e4
    return {
        "x": draw(2, 16, 17, 13),
        "t": torch.tensor([0.7, 0.2]),
        "c_crossattn": draw(2, 7, 24),
        "guidance": torch.tensor([0.0, 0.0]),
        "attention_mask": mask,
    }


def pixels(draw: Draw) -> dict[str, Any]:
    return latent(draw) | {"x": draw(1, 3, 90, 110)}


FAMILIES = (
    Family(
        "Chroma",
        "Chroma",
        BASE,
        {"text": latent, "padded prompts, batch of two": padded_prompts, **joint_patches(latent)},
    ),
    Family("Chroma Radiance", "ChromaRadiance", RADIANCE, {"pixels": pixels}),
)
