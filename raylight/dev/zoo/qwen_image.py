"""Qwen Image, Edit and Layered."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import comfy.ops
import torch

from .family import Draw, Family, randomize
from .patched import joint_patches

BASE = {
    "image_model": "qwen_image",
    "in_channels": 64,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 5,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}


def text_to_image(draw: Draw) -> dict[str, Any]:
    return {"x": draw(1, 16, 1, 18, 22), "t": torch.tensor([0.7]), "c_crossattn": draw(1, 9, 24)}


def padded_prompts(draw: Draw) -> dict[str, Any]:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    return {
        "x": draw(2, 16, 1, 17, 13),
        "t": torch.tensor([0.7, 0.2]),
        "c_crossattn": draw(2, 7, 24),
        "attention_mask": mask,
    }


def edit(method: str) -> Any:
    def call(draw: Draw) -> dict[str, Any]:
        references = [draw(1, 16, 1, 10, 6), draw(1, 16, 1, 7, 9)]
        return text_to_image(draw) | {"ref_latents": references, "ref_latents_method": method}

    return call


def controlled(draw: Draw) -> dict[str, Any]:
    # The first residual covers only some of the tokens, as a smaller control image's does.
    return text_to_image(draw) | {"control": {"input": [draw(1, 60, 80), draw(1, 99, 80)]}}


def diffsynth(draw: Draw) -> dict[str, Any]:
    """Add ComfyUI's own block-wise ControlNet, as its QwenImageDiffsynthControlnet node does."""
    from comfy_extras.nodes_model_patch import DiffSynthCnetPatch, QwenImageBlockWiseControlNet

    class PixelsAsLatent:
        """A substitute for a VAE: 8 pixels per latent one, as Qwen's."""

        @staticmethod
        def encode(image: torch.Tensor) -> torch.Tensor:
            return image[:, ::8, ::8].repeat(1, 1, 1, 6).movedim(-1, 1)[:, :16, None]

        @staticmethod
        def spacial_compression_encode() -> int:
            return 8

    network = QwenImageBlockWiseControlNet(2, dim=80, operations=comfy.ops.disable_weight_init)
    randomize(network, seed=5)
    holder = SimpleNamespace(model=network.eval().requires_grad_(False))
    patch = DiffSynthCnetPatch(holder, PixelsAsLatent, draw(1, 18 * 8, 22 * 8, 3), strength=0.8)
    return text_to_image(draw) | {"transformer_options": {"patches": {"double_block": [patch]}}}


def layers(draw: Draw) -> dict[str, Any]:
    return {
        "x": draw(1, 16, 3, 10, 14),
        "t": torch.tensor([0.4]),
        "c_crossattn": draw(1, 6, 24),
        "additional_t_cond": torch.tensor([1]),
        "ref_latents": [draw(1, 16, 1, 10, 14)],
    }


FAMILIES = (
    Family(
        "Qwen Image",
        "QwenImage",
        BASE,
        {
            "text": text_to_image,
            "padded prompts, batch of two": padded_prompts,
            "ControlNet residuals": controlled,
            "DiffSynth model patch": diffsynth,
            **joint_patches(text_to_image, single_blocks=False, after_blocks=True),
        },
    ),
    Family(
        "Qwen Image Edit",
        "QwenImage",
        BASE,
        {f"references by {method}": edit(method) for method in ("index", "offset", "index_timestep_zero")},
    ),
    Family(
        "Qwen Image Layered",
        "QwenImage",
        BASE | {"use_additional_t_cond": True, "default_ref_method": "negative_index"},
        {"layers": layers},
    ),
)
