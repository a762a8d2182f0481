"""Flux.1."""

from __future__ import annotations

from typing import Any

import torch

from .family import Draw, Family

BASE = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 20, "context_in_dim": 24,
    "hidden_size": 80, "mlp_ratio": 2.0, "num_heads": 5, "depth": 2, "depth_single_blocks": 2,
    "axes_dim": [4, 6, 6], "theta": 10000, "patch_size": 2, "qkv_bias": True, "txt_ids_dims": [],
}


def text_to_image(draw: Draw) -> dict[str, Any]:
    return {"x": draw(1, 16, 18, 22), "t": torch.tensor([0.7]), "c_crossattn": draw(1, 9, 24), "y": draw(1, 20)}


def with_guidance(draw: Draw) -> dict[str, Any]:
    return {
        "x": draw(2, 16, 17, 13), "t": torch.tensor([0.7, 0.2]), "c_crossattn": draw(2, 7, 24), "y": draw(2, 20),
        "guidance": torch.tensor([3.5, 3.5]),
    }


def references(draw: Draw) -> dict[str, Any]:
    return with_guidance(draw) | {"ref_latents": [draw(2, 16, 10, 6), draw(2, 16, 7, 9)]}


def regions(draw: Draw) -> dict[str, Any]:
    tokens = 7 + 9 * 7
    return with_guidance(draw) | {"attention_mask": draw(2, 1, tokens, tokens)}


def controlled(draw: Draw) -> dict[str, Any]:
    # The second residual covers only some of the tokens, as a smaller control image's does.
    residuals = {"input": [draw(2, 63, 80), None], "output": [draw(2, 40, 80), draw(2, 63, 80)]}
    return with_guidance(draw) | {"control": residuals}


FAMILIES = (
    Family("Flux Schnell", "FluxSchnell", BASE | {"guidance_embed": False}, {"text": text_to_image}),
    Family("Flux Dev", "Flux", BASE | {"guidance_embed": True}, {
        "guidance, batch of two, odd size": with_guidance, "Kontext references": references,
        "regional mask": regions, "ControlNet residuals": controlled,
    }),
)
