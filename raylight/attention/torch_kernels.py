"""Attention that also returns the log-sum-exp of its scores, which merging partial attention needs.

Only functions that return a true log-sum-exp are here. A backend that returns zeros in its place gives a wrong
merge without any error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

Partial = tuple[Tensor, Tensor]
LseFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], Partial]

QUERY_CHUNK = 1024


def reference_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Partial:
    """Softmax attention from its definition, some queries at a time; works for every dtype, mask and device.

    q (B, H, Sq, D), k and v (B, H, Sk, D). Returns (B, H, Sq, D) and the log-sum-exp (B, H, Sq) in float32.
    A query whose keys are all masked gets zeros and -inf.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outs, sums = [], []
    for start in range(0, q.shape[2], QUERY_CHUNK):
        rows = slice(start, start + QUERY_CHUNK)
        scores = (q[:, :, rows] @ k.transpose(-1, -2)).float() * scale
        if mask is not None:
            part = mask if mask.shape[-2] == 1 else mask[..., rows, :]
            scores = scores.masked_fill(~part, float("-inf")) if part.dtype == torch.bool else scores + part
        total = scores.logsumexp(-1)
        weights = (scores - total.clamp_min(torch.finfo(torch.float32).min)[..., None]).exp()
        outs.append(weights.to(v.dtype) @ v)
        sums.append(total)
    return torch.cat(outs, 2), torch.cat(sums, 2)


def flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Partial:
    """PyTorch's flash attention: on the CPU with masks, on CUDA without. Uses `reference_attention` for a boolean mask,
    whose fully masked rows flash attention leaves undefined."""
    if q.device.type == "cpu" and (mask is None or mask.dtype != torch.bool):
        bias = None if mask is None else mask.to(q.dtype).expand(q.shape[0], q.shape[1], -1, k.shape[2])
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=bias, scale=scale
        )
    if q.device.type == "cuda" and mask is None and q.dtype in (torch.float16, torch.bfloat16):
        out, total, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
        return out, total
    return reference_attention(q, k, v, mask, scale)


def efficient(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Partial:
    """PyTorch's memory-efficient attention on CUDA, `flash` elsewhere."""
    if q.device.type != "cuda" or mask is not None:
        return flash(q, k, v, mask, scale)
    out, total, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)
    return out, total[..., : q.shape[2]]  # it pads queries to a multiple of its tile


def cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Partial:
    """cuDNN's attention on CUDA in half precision without a mask, `flash` elsewhere."""
    if q.device.type != "cuda" or mask is not None or q.dtype not in (torch.float16, torch.bfloat16):
        return flash(q, k, v, mask, scale)
    out, total, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)
    return out, total.reshape(q.shape[:3])


def merge(out: Tensor, total: Tensor, more: Tensor, block_lse: Tensor) -> Partial:
    """Attention over two sets of keys from attention over each: outputs (B, H, S, D) in float32, sums (B, H, S).

    The online softmax of Milakov and Gimelshein (2018, arXiv 1805.02867), as ring attention uses it.
    """
    both = torch.logaddexp(total, block_lse)
    floor = both.clamp_min(torch.finfo(torch.float32).min)
    left, right = (total - floor).exp()[..., None], (block_lse - floor).exp()[..., None]
    # A part with no weight may hold anything, NaN included.
    out = torch.where(left > 0, out * left, 0.0) + torch.where(right > 0, more.float() * right, 0.0)
    return out, both


# What PyTorch may take, best first. The rest stands behind the chosen one for the calls that it does not
# support (a mask in flash attention, say): the result is the same, and no call fails.
_ORDER = {
    "TORCH": None,
    "TORCH_FLASH": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "TORCH_EFFICIENT": [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH],
    "TORCH_CUDNN": [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ],
}

# The same choices with a log-sum-exp.
_WITH_LSE: dict[str, LseFunction] = {
    "TORCH": reference_attention,
    "TORCH_FLASH": flash,
    "TORCH_EFFICIENT": efficient,
    "TORCH_CUDNN": cudnn,
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

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Partial:
        """As `__call__`, with the log-sum-exp (B, H, Sq) of the scores beside the output."""
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        return _WITH_LSE[self.name](q, k, v, mask, scale)
