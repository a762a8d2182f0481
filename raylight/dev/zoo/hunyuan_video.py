"""Hunyuan Video 1.0 and 1.5, Hunyuan Image 2.1."""

from __future__ import annotations

from typing import Any

import torch

from .family import Draw, Family
from .patched import joint_patches

BASE = {
    "image_model": "hunyuan_video",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 20,
    "context_in_dim": 24,
    "hidden_size": 80,
    "mlp_ratio": 2.0,
    "num_heads": 5,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [4, 6, 6],
    "theta": 256,
    "patch_size": [1, 2, 2],
    "qkv_bias": True,
    "guidance_embed": True,
    "byt5": False,
    "meanflow": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
}
V15 = BASE | {
    "depth_single_blocks": 0,
    "vec_in_dim": None,
    "guidance_embed": False,
    "byt5": True,
    "use_cond_type_embedding": True,
    "vision_in_dim": 1152,
    "meanflow_sum": True,
    "patch_size": [1, 1, 1],
    "in_channels": 65,
    "out_channels": 32,
}


def text_to_video(draw: Draw) -> dict[str, Any]:
    return {
        "x": draw(1, 16, 3, 14, 18),
        "t": torch.tensor([0.7]),
        "c_crossattn": draw(1, 9, 24),
        "y": draw(1, 20),
        "guidance": torch.tensor([6.0]),
    }


def batch_of_two(draw: Draw) -> dict[str, Any]:
    return {
        "x": draw(2, 16, 1, 10, 14),
        "t": torch.tensor([0.7, 0.3]),
        "c_crossattn": draw(2, 7, 24),
        "y": draw(2, 20),
        "guidance": torch.tensor([6.0, 6.0]),
    }


def padded_prompt(draw: Draw) -> dict[str, Any]:
    return text_to_video(draw) | {"attention_mask": torch.tensor([[1] * 6 + [0] * 3])}


def controlled(draw: Draw) -> dict[str, Any]:
    tokens = 3 * 7 * 9
    return text_to_video(draw) | {
        "control": {"input": [draw(1, tokens, 80), None], "output": [draw(1, tokens, 80), draw(1, tokens, 80)]}
    }


def token_replace(draw: Draw) -> dict[str, Any]:
    return text_to_video(draw) | {"guiding_frame_index": torch.tensor([0.0])}


def image_to_video(draw: Draw) -> dict[str, Any]:
    return text_to_video(draw) | {"c_concat": draw(1, 17, 3, 14, 18)}


def skyreels(draw: Draw) -> dict[str, Any]:
    return text_to_video(draw) | {"c_concat": draw(1, 16, 3, 14, 18)}


def version_15(draw: Draw) -> dict[str, Any]:
    return {
        "x": draw(1, 32, 3, 7, 9),
        "t": torch.tensor([0.7]),
        "c_crossattn": draw(1, 9, 24),
        "c_concat": draw(1, 33, 3, 7, 9),
        "txt_byt5": draw(1, 5, 1472),
        "clip_fea": draw(1, 11, 1152),
    }


def super_resolution(draw: Draw) -> dict[str, Any]:
    return version_15(draw) | {"c_concat": draw(1, 66, 3, 7, 9), "disable_time_r": True}


def image_21(draw: Draw) -> dict[str, Any]:
    return {
        "x": draw(2, 64, 11, 9),
        "t": torch.tensor([0.7, 0.2]),
        "c_crossattn": draw(2, 9, 24),
        "txt_byt5": draw(2, 5, 1472),
    }


def refiner(draw: Draw) -> dict[str, Any]:
    return {
        "x": draw(1, 64, 1, 7, 9),
        "t": torch.tensor([0.5]),
        "c_crossattn": draw(1, 9, 24),
        "c_concat": draw(1, 64, 1, 7, 9),
        "disable_time_r": True,
    }


FAMILIES = (
    Family(
        "Hunyuan Video",
        "HunyuanVideo",
        BASE,
        {
            "text": text_to_video,
            "batch of two": batch_of_two,
            "padded prompt": padded_prompt,
            "ControlNet residuals": controlled,
            **joint_patches(text_to_video),
        },
    ),
    Family(
        "Hunyuan Video I2V",
        "HunyuanVideoI2V",
        BASE | {"in_channels": 33},
        {"image": image_to_video, "token replace": lambda draw: image_to_video(draw) | token_replace(draw)},
    ),
    Family("Hunyuan Video Skyreels I2V", "HunyuanVideoSkyreelsI2V", BASE | {"in_channels": 32}, {"image": skyreels}),
    Family("Hunyuan Video 1.5", "HunyuanVideo15", V15, {"byt5 and image": version_15}),
    Family(
        "Hunyuan Video 1.5 super-resolution",
        "HunyuanVideo15_SR_Distilled",
        V15 | {"in_channels": 98},
        {"video": super_resolution},
    ),
    Family(
        "Hunyuan Image 2.1",
        "HunyuanImage21",
        BASE
        | {
            "vec_in_dim": None,
            "guidance_embed": False,
            "patch_size": [1, 1],
            "axes_dim": [8, 8],
            "byt5": True,
            "in_channels": 64,
            "out_channels": 64,
        },
        {"text, batch of two": image_21},
    ),
    Family(
        "Hunyuan Image 2.1 refiner",
        "HunyuanImage21Refiner",
        BASE
        | {
            "vec_in_dim": None,
            "guidance_embed": False,
            "patch_size": [1, 1, 1],
            "in_channels": 128,
            "out_channels": 64,
            "meanflow": True,
        },
        {"image": refiner},
    ),
)
