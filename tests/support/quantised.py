"""Checkpoints with quantised weights, as ComfyUI's formats have them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from safetensors.torch import load_file, save_file
from torch import Tensor

OLD_SCALED_FP8 = "scaled fp8 of old"
FORMATS = (OLD_SCALED_FP8, *QUANT_ALGOS)


def quantise(source: Path, target: Path, form: str) -> None:
    """Write the checkpoint with the matrices of its blocks in a format of `FORMATS`."""
    tensors = {}
    for name, tensor in load_file(source).items():
        if tensor.ndim == 2 and "blocks." in name and name.endswith(".weight"):
            tensors.update(_quantised(name, tensor, form))
        else:
            tensors[name] = tensor
    if form == OLD_SCALED_FP8:
        tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(tensors, target)


def _quantised(name: str, tensor: Tensor, form: str) -> dict[str, Tensor]:
    layer = name.removesuffix(".weight")
    if form == OLD_SCALED_FP8:
        scale = tensor.abs().max() / 448
        return {name: (tensor / scale).to(torch.float8_e4m3fn), f"{layer}.scale_weight": scale}
    quantised = QuantizedTensor.from_float(tensor, QUANT_ALGOS[form]["comfy_tensor_layout"], scale="recalculate")
    config = torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)
    return quantised.state_dict(name) | {f"{layer}.comfy_quant": config}


def gathered_bytes(path: Path, world: int, dtype: torch.dtype | None = None) -> int:
    """Return the bytes that `world` ranks have after they have gathered the matrices of a checkpoint as it stores them,
    or as this dtype: each rank gives as many rows as the first one has.
    """
    matrices = [one.to(dtype or one.dtype) for one in load_file(path).values() if one.ndim >= 2]
    matrices = [one for one in matrices if one.shape[0] >= world]
    return sum(world * -(-one.shape[0] // world) * one[:1].nbytes for one in matrices)
