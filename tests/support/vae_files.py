"""VAE files in the forms that people have, with random weights from a fixed seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import comfy.ldm.wan.vae
import torch
from comfy.ldm.models.autoencoder import AutoencodingEngine
from safetensors.torch import save_file
from torch import nn


def _flux() -> nn.Module:
    config = {
        "double_z": True,
        "z_channels": 16,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
        "ch_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    network = "comfy.ldm.modules.diffusionmodules.model"
    return AutoencodingEngine(
        regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
        encoder_config={"target": f"{network}.Encoder", "params": config},
        decoder_config={"target": f"{network}.Decoder", "params": config},
    )


def _wan(width: int = 96) -> nn.Module:
    return comfy.ldm.wan.vae.WanVAE(
        dim=width,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        image_channels=3,
        conv_out_channels=3,
        dropout=0.0,
    )


FORMS: dict[str, Callable[[], nn.Module]] = {"flux": _flux, "wan": _wan, "wan-narrow": lambda: _wan(8)}


def write_vae(path: Path, form: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Write a VAE whose activations neither vanish nor grow, so that each part of a latent affects the picture."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, value in FORMS[form]().state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim >= 2 and min(value.shape[:2]) > 1 and not name.endswith("gamma"):
            tensors[name] = noise * value[0].numel() ** -0.5
        elif name.endswith("bias"):
            tensors[name] = 0.1 * noise
        else:  # a norm
            tensors[name] = 1 + 0.1 * noise
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.to(dtype).contiguous() for name, value in tensors.items()}, path)
    return path
