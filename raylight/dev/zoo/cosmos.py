"""Cosmos 1.0, Cosmos Predict2 and Anima."""

from __future__ import annotations

from typing import Any

import torch
from comfy.model_base import BaseModel
from torch import Tensor

from .family import Draw, Family, since
from .patched import _mixed, patched

BASE = {
    "image_model": "cosmos",
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 80,
    "num_blocks": 2,
    "num_heads": 5,
    "block_config": "FA-CA-MLP",
    "concat_padding_mask": True,
    "pos_emb_cls": "rope3d",
    "pos_emb_learnable": False,
    "pos_emb_interpolation": "crop",
    "block_x_format": "THWBD",
    "affline_emb_norm": True,
    "use_adaln_lora": True,
    "adaln_lora_dim": 16,
    "crossattn_emb_channels": 24,
    "extra_per_block_abs_pos_emb": True,
    "extra_per_block_abs_pos_emb_type": "learnable",
    "rope_h_extrapolation_ratio": 1.0,
    "rope_w_extrapolation_ratio": 1.0,
    "rope_t_extrapolation_ratio": 2.0,
}
PREDICT2 = {
    key: value
    for key, value in BASE.items()
    if key not in ("block_config", "block_x_format", "affline_emb_norm", "extra_per_block_abs_pos_emb_type")
} | {
    "image_model": "cosmos_predict2",
    "pos_emb_learnable": True,
    "min_fps": 1,
    "max_fps": 30,
    "extra_per_block_abs_pos_emb": False,
    "rope_enable_fps_modulation": False,
}


def smaller_text_adapter(model: BaseModel) -> None:
    """Reduce Anima's text adapter to one block of six, and 1000 words of 32128."""
    adapter = model.diffusion_model.llm_adapter
    del adapter.blocks[1:]
    adapter.embed.weight = torch.nn.Parameter(adapter.embed.weight[:1000].clone())


def text(draw: Draw) -> dict[str, Any]:
    return {"x": draw(2, 16, 3, 14, 18), "t": torch.tensor([0.7, 0.2]), "c_crossattn": draw(2, 9, 24), "fps": None}


def image_to_video(draw: Draw) -> dict[str, Any]:
    return text(draw) | {"c_concat": draw(2, 1, 3, 14, 18)}


def first_frame_kept(draw: Draw) -> dict[str, Any]:
    mask = torch.ones(2, 1, 3, 14, 18)
    mask[:, :, 0] = 0
    return image_to_video(draw) | {"denoise_mask": mask}


def one_image(draw: Draw) -> dict[str, Any]:
    return text(draw) | {"x": draw(2, 16, 1, 17, 13)}


def before_attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> dict[str, Tensor]:
    """Patch Predict2's attention over tokens (B, S, D); in attention to text only `q` belongs to the image."""
    return {"q": _mixed(q)}


def before_mlp(arguments: dict[str, Any]) -> dict[str, Any]:
    x = arguments["x"]
    return arguments | {"x": _mixed(x.flatten(1, 3)).reshape(x.shape)}


FAMILIES = (
    Family("Cosmos T2V", "CosmosT2V", BASE, {"text, batch of two": text}),
    Family("Cosmos I2V", "CosmosI2V", BASE | {"in_channels": 17}, {"image, batch of two": image_to_video}),
    Family(
        "Cosmos Predict2 T2I",
        "CosmosT2IPredict2",
        PREDICT2,
        {
            "text, batch of two": one_image,
            **since(
                "0.30.0",
                {
                    "patches": patched(
                        one_image, attn1_patch=before_attention, attn2_patch=before_attention, mlp_patch=before_mlp
                    )
                },
            ),
        },
    ),
    Family(
        "Cosmos Predict2 I2V",
        "CosmosI2VPredict2",
        PREDICT2 | {"in_channels": 17},
        {"image": image_to_video, "timestep per frame": first_frame_kept},
    ),
    Family(
        "Anima",
        "Anima",
        PREDICT2 | {"image_model": "anima"},
        {"text, batch of two": one_image},
        trim=smaller_text_adapter,
    ),
)
