"""Checkpoints of real architectures at tiny widths, with random weights from a fixed seed.

Key names and shapes follow published files, so ComfyUI detects and loads them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.ldm.flux.model
import comfy.ldm.wan.model
import comfy.ops
import torch
from safetensors.torch import save_file
from torch import nn

HEAD_WIDTH = 128  # what ComfyUI's detection takes for granted in both families


def _wan(model_type: str, heads: int, layers: int) -> nn.Module:
    return comfy.ldm.wan.model.WanModel(
        model_type=model_type,
        in_dim=16 if model_type == "t2v" else 36,
        out_dim=16,
        dim=HEAD_WIDTH * heads,
        ffn_dim=HEAD_WIDTH * heads * 2,
        freq_dim=256,
        text_dim=4096,
        num_heads=heads,
        num_layers=layers,
        **_ops(),
    )


def _flux(guidance: bool, heads: int, layers: int) -> nn.Module:
    return comfy.ldm.flux.model.Flux(
        in_channels=16,
        out_channels=16,
        vec_in_dim=96,
        context_in_dim=160,
        hidden_size=HEAD_WIDTH * heads,
        mlp_ratio=4.0,
        num_heads=heads,
        depth=layers,
        depth_single_blocks=layers,
        axes_dim=[16, 56, 56],
        theta=10000,
        patch_size=2,
        qkv_bias=True,
        guidance_embed=guidance,
        txt_ids_dims=[],
        **_ops(),
    )


def _ops() -> dict[str, Any]:
    return {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}


FAMILIES: dict[str, Callable[[int, int], nn.Module]] = {
    "wan-t2v": lambda heads, layers: _wan("t2v", heads, layers),
    "wan-i2v": lambda heads, layers: _wan("i2v", heads, layers),
    "flux-schnell": lambda heads, layers: _flux(False, heads, layers),
    "flux-dev": lambda heads, layers: _flux(True, heads, layers),
}


def write_checkpoint(path: Path, family: str, *, heads: int = 3, layers: int = 2, seed: int = 0) -> None:
    """Write a random model of a family as a safetensors file of float32 tensors with published key names.

    Linear weights are scaled by fan-in, so that activations neither vanish nor grow and every token affects the result.
    """
    model = FAMILIES[family](heads, layers)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in model.state_dict().items():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            tensors[name] = noise * parameter[0].numel() ** -0.5
        elif "norm" in name and name.endswith(("weight", "scale")):
            tensors[name] = 1 + 0.1 * noise
        else:
            tensors[name] = 0.1 * noise
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
