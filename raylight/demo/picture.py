"""Latents as something to look at, without a VAE: ComfyUI's own linear approximation of its colours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def write_animation(latent: Tensor, factors: list[list[float]], bias: list[float] | None, path: Path,
                    scale: int = 16) -> Path:
    """Write latent (1, C, T, H, W) as an animated WebP, or (1, C, H, W) as a PNG, `scale` pixels for each of its
    points. `factors` (C, 3) and `bias` (3) are a latent format's `latent_rgb_factors`."""
    if latent.ndim == 4:
        latent = latent.unsqueeze(2)
    matrix = torch.tensor(factors, dtype=torch.float32)
    colours = latent[0].float().permute(1, 2, 3, 0) @ matrix  # (T, H, W, 3)
    if bias is not None:
        colours += torch.tensor(bias)
    colours = ((colours + 1) / 2).clamp(0, 1).mul(255).byte().numpy().astype(np.uint8)
    frames = [
        Image.fromarray(frame).resize((frame.shape[1] * scale, frame.shape[0] * scale), Image.Resampling.BICUBIC)
        for frame in colours
    ]
    path = path.with_suffix(".webp" if len(frames) > 1 else ".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(path, save_all=len(frames) > 1, append_images=frames[1:], duration=200, loop=0, lossless=True)
    return path
