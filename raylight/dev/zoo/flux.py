"""Flux.1, Flux.2 and LongCat Image."""

from __future__ import annotations

from typing import Any

import torch

from .family import Draw, Family
from .patched import joint_patches

BASE = {
    "image_model": "flux",
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
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "txt_ids_dims": [],
}


def text_to_image(draw: Draw) -> dict[str, Any]:
    return {"x": draw(1, 16, 18, 22), "t": torch.tensor([0.7]), "c_crossattn": draw(1, 9, 24), "y": draw(1, 20)}


def with_guidance(draw: Draw) -> dict[str, Any]:
    return {
        "x": draw(2, 16, 17, 13),
        "t": torch.tensor([0.7, 0.2]),
        "c_crossattn": draw(2, 7, 24),
        "y": draw(2, 20),
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


def inpaint(draw: Draw) -> dict[str, Any]:
    return with_guidance(draw) | {"c_concat": draw(2, 80, 17, 13)}


def latent_of_patches(draw: Draw) -> dict[str, Any]:
    return {
        "x": draw(2, 32, 9, 7),
        "t": torch.tensor([0.7, 0.2]),
        "c_crossattn": draw(2, 7, 24),
        "guidance": torch.tensor([3.5, 3.5]),
    }


def references_at_time_zero(draw: Draw) -> dict[str, Any]:
    return {
        "x": draw(1, 32, 9, 7),
        "t": torch.tensor([0.7]),
        "c_crossattn": draw(1, 7, 24),
        "ref_latents": [draw(1, 32, 5, 6), draw(1, 32, 4, 7)],
        "ref_latents_method": "index_timestep_zero",
    }


FLUX2 = BASE | {
    "image_model": "flux2",
    "in_channels": 32,
    "out_channels": 32,
    "vec_in_dim": None,
    "axes_dim": [4, 4, 4, 4],
    "theta": 2000,
    "patch_size": 1,
    "mlp_ratio": 3.0,
    "global_modulation": True,
    "mlp_silu_act": True,
    "qkv_bias": False,
    "ops_bias": False,
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
    "txt_ids_dims": [3],
}

FAMILIES = (
    Family("Flux Schnell", "FluxSchnell", BASE | {"guidance_embed": False}, {"text": text_to_image}),
    Family(
        "Flux Dev",
        "Flux",
        BASE | {"guidance_embed": True},
        {
            "guidance, batch of two, odd size": with_guidance,
            "Kontext references": references,
            "regional mask": regions,
            "ControlNet residuals": controlled,
            **joint_patches(with_guidance),
        },
    ),
    Family("Flux Inpaint", "FluxInpaint", BASE | {"guidance_embed": True, "in_channels": 96}, {"image": inpaint}),
    Family("Flux 2", "Flux2", FLUX2 | {"guidance_embed": True}, {"text, batch of two": latent_of_patches}),
    Family(
        "Flux 2 without guidance",
        "Flux2",
        FLUX2 | {"guidance_embed": False},
        {"references at time zero": references_at_time_zero},
    ),
    Family(
        "LongCat Image",
        "LongCatImage",
        BASE | {"guidance_embed": False, "vec_in_dim": None, "txt_ids_dims": [1, 2]},
        {"text": text_to_image},
    ),
)
