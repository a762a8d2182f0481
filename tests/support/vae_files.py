"""VAE files in the forms that people have, with random weights from a fixed seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from raylight.dev import full_vaes

FORMS: dict[str, Callable[[], nn.Module]] = {
    "flux": full_vaes.flux,
    "wan": full_vaes.wan,
    "wan-narrow": lambda: full_vaes.wan(8),
}


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
