"""What workers of this machine would compute on, which is what ComfyUI computes on."""

from __future__ import annotations

import comfy.model_management
import torch

_CUDA, _CPU = "cuda", "cpu"
_NAMES = {"xpu": "an Intel GPU (xpu)", "mps": "an Apple GPU (mps)", "npu": "an Ascend NPU (npu)",
          "mlu": "a Cambricon MLU (mlu)", "privateuseone": "DirectML"}


def device_type() -> str:
    """"cuda", for NVIDIA and for AMD by ROCm, or "cpu", where ComfyUI was started with --cpu.

    Raises ValueError where ComfyUI uses an accelerator that workers cannot."""
    found = comfy.model_management.get_torch_device().type
    if found not in (_CUDA, _CPU):
        raise ValueError(f"ComfyUI computes on {_NAMES.get(found, found)} here, and Raylight has workers for NVIDIA "
                         f"and AMD (ROCm) GPUs only: take ComfyUI's own loaders and samplers on this machine. To try "
                         f"Raylight with workers on the CPU, start ComfyUI with --cpu")
    return found


def gpus() -> int:
    """How many GPUs workers of this machine can have. Raises as `device_type`."""
    return torch.cuda.device_count() if device_type() == _CUDA else 0
