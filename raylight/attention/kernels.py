"""The attention kernels that a person can choose by name.

The names are the members of yunchang's `AttnType`, which saved workflows hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from . import lse

NAMES = (
    "TORCH", "TORCH_FLASH", "TORCH_EFFICIENT", "TORCH_CUDNN", "AITER", "FA", "FA3", "FLASHINFER",
    "SAGE_AUTO", "SAGE_FP16", "SAGE_FP16_TRITON", "SAGE_FP8", "SAGE_FP8_SM90", "SPARSE_SAGE",
)

# What PyTorch may take, best first. The rest stands behind the chosen one for the calls that it does not
# support (a mask in flash attention, say): the result is the same, and no call fails.
_ORDER = {
    "TORCH": None,
    "TORCH_FLASH": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "TORCH_EFFICIENT": [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH],
    "TORCH_CUDNN": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                    SDPBackend.MATH],
}

# The same choices with a log-sum-exp.
_WITH_LSE: dict[str, lse.LseFunction] = {
    "TORCH": lse.written_out, "TORCH_FLASH": lse.flash, "TORCH_EFFICIENT": lse.efficient, "TORCH_CUDNN": lse.cudnn,
}


@dataclass(frozen=True, slots=True)
class TorchKernel:
    """PyTorch's scaled dot product attention with a preferred backend."""

    name: str

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """q (B, H, Sq, D), k and v (B, Hkv, Sk, D), mask (B|1, H|1, Sq|1, Sk); returns (B, H, Sq, D)."""
        order = _ORDER[self.name]
        grouped = q.shape[1] != k.shape[1]
        if order is None:
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
        with sdpa_kernel(order, set_priority=True):
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> lse.Partial:
        """As `__call__`, with the log-sum-exp (B, H, Sq) of the scores beside the output."""
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        return _WITH_LSE[self.name](q, k, v, mask, scale)


def check_available(name: str) -> None:
    """Raises ValueError, naming what could be chosen, when this Raylight has no kernel of that name."""
    if name not in _ORDER:
        raise ValueError(
            f"XFuser_attention = {name} is not available in this version of Raylight: choose one of {', '.join(_ORDER)}"
        )
    if name == "TORCH_CUDNN" and not torch.backends.cudnn.is_available():
        raise ValueError("XFuser_attention = TORCH_CUDNN needs an NVIDIA GPU with cuDNN: choose TORCH or TORCH_FLASH")


def kernel(name: str) -> TorchKernel:
    """The kernel of that name. Raises ValueError as `check_available`."""
    check_available(name)
    return TorchKernel(name)
