"""Flux checkpoints named as diffusers names them."""

from __future__ import annotations

from pathlib import Path

import comfy.utils
import torch
from safetensors.torch import load_file, save_file


def as_diffusers(source: Path, target: Path) -> None:
    """Write a Flux file of ComfyUI's names with those of diffusers, query, key and value apart."""
    tensors = load_file(source)
    config = {"depth": 2, "depth_single_blocks": 2, "hidden_size": tensors["img_in.weight"].shape[0]}
    made, taken = {}, set()
    for name, place in comfy.utils.flux_to_diffusers(config).items():
        if "qkv_mlp" in name:
            continue
        ours, part, change = (*((place,) if isinstance(place, str) else place), None, None)[:3]
        # ComfyUI knows several names of some, of Flux 2 among them; the first are Flux's.
        if ours not in tensors or (ours, part) in taken or (ours, None) in taken:
            continue
        taken.add((ours, part))
        tensor = tensors[ours]
        if part is not None:
            tensor = tensor.narrow(*part)
        if change is not None:
            tensor = torch.cat(tensor.chunk(2)[::-1])  # scale and shift, the other way round
        made[name] = tensor.contiguous()
    save_file(made, target)
