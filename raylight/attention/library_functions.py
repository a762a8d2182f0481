"""How the attention of each optional library is called.

Each function here imports a library and returns its attention with one signature, `Function`. They are called directly
where that is one call; FlashAttention 3 and AITER, which differ from version to version, through yunchang.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from .torch_kernels import Partial

# q, k, v (B, S, H, D) and a scale -> the output (B, S, H, D), and the log-sum-exp (B, H, S) in float32 or None.
Function = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor | None]]


def flash_attention_2() -> Function:
    """Return flash-attn 2. Its third result, the probabilities, is empty without dropout."""
    attention = importlib.import_module("flash_attn.flash_attn_interface").flash_attn_func

    def call(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, _ = attention(q, k, v, softmax_scale=scale, return_attn_probs=True)
        return out, lse

    return call


def flash_attention_4() -> Function:
    """Return flash-attn-4, which is compiled for the GPU at its first call."""
    attention = importlib.import_module("flash_attn.cute").flash_attn_func

    def call(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return attention(q, k, v, softmax_scale=scale, return_lse=True)

    return call


def flashinfer() -> Function:
    """Return FlashInfer's attention, which takes one sequence a call and gives its log-sum-exp in base 2."""
    attention = importlib.import_module("flashinfer").single_prefill_with_kv_cache

    def call(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        results = [attention(*one, sm_scale=scale, return_lse=True) for one in zip(q, k, v, strict=True)]
        outs, lses = zip(*results, strict=True)
        return torch.stack(outs), torch.stack(lses).transpose(1, 2) * math.log(2)  # (B, S, H) -> (B, H, S)

    return call


def through_yunchang(member: str) -> Callable[[], Function]:
    """Return a function that returns the attention that yunchang calls by `member` of its `AttnType`."""

    def function() -> Function:
        from yunchang.kernels import AttnType, select_flash_attn_impl

        forward = cast("Callable[..., Partial]", select_flash_attn_impl(AttnType[member], stage="fwd-only"))

        def call(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
            return forward(
                q,
                k,
                v,
                dropout_p=0.0,
                softmax_scale=scale,
                causal=False,
                window_size=(-1, -1),
                softcap=0.0,
                alibi_slopes=None,
                return_softmax=False,
            )

        return call

    return function


def sage(name: str, **options: Any) -> Callable[[], Function]:
    """Return a function that returns SageAttention's function `name`, or the only one that version 1 has."""

    def function() -> Function:
        sageattention = importlib.import_module("sageattention")
        attention = getattr(sageattention, name, None) or sageattention.sageattn
        returns_lse = sage_has_lse()

        def call(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
            if returns_lse:
                return attention(q, k, v, tensor_layout="NHD", sm_scale=scale, return_lse=True, **options)
            # Version 1 subtracts the mean of the keys in place.
            return attention(q, k.clone(), v, tensor_layout="NHD", sm_scale=scale), None

        return call

    return function


def sage_3() -> Function:
    """Return SageAttention 3, in 4 bits. It takes (B, H, S, D), and its scale is always D**-0.5."""
    attention = importlib.import_module("sageattn3").sageattn3_blackwell

    def call(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, None]:
        width = q.shape[-1]
        if not math.isclose(scale, width**-0.5):
            q = q * (scale * width**0.5)
        q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
        return attention(q, k, v, is_causal=False).transpose(1, 2), None

    return call


def comfy_kitchen_int8() -> Function:
    """Return ComfyUI's own attention in 8 bits, which takes (B, H, S, D) of any strides with D contiguous."""
    attention = importlib.import_module("comfy_kitchen").int8_attention

    def call(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, None]:
        return attention(*(t.transpose(1, 2) for t in (q, k, v)), scale=scale).transpose(1, 2), None

    return call


def sage_has_lse() -> bool:
    """Return whether the installed SageAttention has a log-sum-exp: version 2 has, 1 has not."""
    try:
        return int(importlib.metadata.version("sageattention").split(".")[0]) >= 2
    except importlib.metadata.PackageNotFoundError:
        return False


def sage_key_block() -> int:
    """Return the block to which SageAttention pads keys without masking them, as version 1 does."""
    return 1 if sage_has_lse() else 64
