"""Kandinsky 5, video and image."""

from __future__ import annotations

from typing import Any

import torch

from .family import Draw, Family

BASE = {
    "image_model": "kandinsky5",
    "model_dim": 80,
    "axes_dims": (4, 6, 6),
    "time_dim": 16,
    "ff_dim": 96,
    "visual_embed_dim": 132,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "in_text_dim": 24,
    "in_text_dim2": 20,
}
IMAGE = BASE | {"visual_embed_dim": 64, "rope_scale_factor": (1.0, 1.0, 1.0)}


def video(draw: Draw) -> dict[str, Any]:
    return {
        "x": draw(2, 16, 3, 14, 10),
        "t": torch.tensor([0.7, 0.2]),
        "c_crossattn": draw(2, 9, 24),
        "y": draw(2, 20),
        "c_concat": draw(2, 17, 3, 14, 10),
    }


def image_to_video(draw: Draw) -> dict[str, Any]:
    return video(draw) | {"time_dim_replace": draw(2, 16, 1, 14, 10)}


def image(draw: Draw) -> dict[str, Any]:
    return {"x": draw(2, 16, 18, 14), "t": torch.tensor([0.7, 0.2]), "c_crossattn": draw(2, 9, 24), "y": draw(2, 20)}


FAMILIES = (
    Family("Kandinsky 5", "Kandinsky5", BASE, {"text, batch of two": video, "image to video": image_to_video}),
    Family("Kandinsky 5 Image", "Kandinsky5Image", IMAGE, {"text, batch of two": image}),
)
