"""PyTorch's attention as kernels, with the log-sum-exp of the scores that a merge of partial attention needs.

Only functions that return a true log-sum-exp are here. A backend that returns zeros in its place gives a wrong merge
without any error.

Shapes: q (B, H, Sq, D), k and v (B, H, Sk, D), mask (B|1, H|1, Sq|1, Sk) boolean or added to the scores, output
(B, H, Sq, D) of v's dtype, lse (B, H, Sq) in float32. A scale of None is D ** -0.5.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

Partial = tuple[Tensor, Tensor]  # output and lse
LseFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], Partial]

QUERY_CHUNK = 1024


def reference_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Partial:
    """Compute softmax attention from its definition, a chunk of queries at a time, for every dtype, mask and device.

    A query whose keys are all masked gets zeros, and an lse of -inf.
    """
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    outs, lses = [], []
    for start in range(0, q.shape[2], QUERY_CHUNK):
        chunk = slice(start, start + QUERY_CHUNK)
        scores = (q[:, :, chunk] @ k.transpose(-1, -2)).float() * factor  # (B, H, chunk, Sk)
        if mask is not None:
            bias = mask if mask.shape[-2] == 1 else mask[..., chunk, :]
            scores = scores.masked_fill(~bias, float("-inf")) if bias.dtype == torch.bool else scores + bias
        lse = scores.logsumexp(-1)  # (B, H, chunk)
        weights = (scores - lse.clamp_min(torch.finfo(torch.float32).min)[..., None]).exp()
        outs.append(weights.to(v.dtype) @ v)
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Partial:
    """Call PyTorch's flash attention: on the CPU with masks, on CUDA in half precision without.

    Other calls use `reference_attention`; so do boolean masks, since flash attention leaves undefined what queries get
    whose keys are all masked.
    """
    if q.device.type == "cpu" and (mask is None or mask.dtype != torch.bool):
        bias = None if mask is None else mask.to(q.dtype).expand(q.shape[0], q.shape[1], -1, k.shape[2])
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=bias, scale=scale
        )
    if q.device.type == "cuda" and mask is None and q.dtype in (torch.float16, torch.bfloat16):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
        return out, lse
    return reference_attention(q, k, v, mask, scale)


def efficient(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Partial:
    """Call PyTorch's memory-efficient attention on CUDA without a mask, `flash` otherwise."""
    if q.device.type != "cuda" or mask is not None:
        return flash(q, k, v, mask, scale)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)
    return out, lse[..., : q.shape[2]]  # it pads queries to a multiple of its tile


def cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Partial:
    """Call cuDNN's attention on CUDA in half precision without a mask, `flash` otherwise."""
    if q.device.type != "cuda" or mask is not None or q.dtype not in (torch.float16, torch.bfloat16):
        return flash(q, k, v, mask, scale)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)
    return out, lse.reshape(q.shape[:3])


def merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> Partial:
    """Return attention over two sets of keys, from attention over each.

    `out` (B, H, Sq, D), `lse` and `block_lse` (B, H, Sq) are float32, as is the result; `block_out` (B, H, Sq, D) is of
    any dtype. This is the online softmax of Milakov and Gimelshein (2018, arXiv 1805.02867), as ring attention uses it.
    """
    merged = torch.logaddexp(lse, block_lse)
    floor = merged.clamp_min(torch.finfo(torch.float32).min)
    weight, block_weight = (lse - floor).exp()[..., None], (block_lse - floor).exp()[..., None]  # (B, H, Sq, 1)
    # An output of weight zero may be anything, NaN included.
    out = torch.where(weight > 0, out * weight, 0.0)
    return out + torch.where(block_weight > 0, block_out.float() * block_weight, 0.0), merged


# The backends that PyTorch may use, best first. Those after the chosen one serve the calls that it does not support (a
# mask in flash attention, say): the result is the same, and no call fails.
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
    """A kernel: PyTorch's scaled dot product attention, `name` the preferred backend."""

    name: str

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """Attend with k and v (B, HKV, Sk, D), HKV dividing H; all else as in this module. Return (B, H, Sq, D)."""
        order, grouped = _ORDER[self.name], q.shape[1] != k.shape[1]
        with nullcontext() if order is None else sdpa_kernel(order, set_priority=True):
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Partial:
        """As `__call__`. Return the output, and the lse (B, H, Sq) of the scores."""
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        return _WITH_LSE[self.name](q, k, v, mask, scale)
