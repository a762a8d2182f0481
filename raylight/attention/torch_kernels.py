"""PyTorch's scaled dot product attention: needs nothing installed, takes every dtype, mask and head size."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from . import lse

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

NAMES = tuple(_ORDER)


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
