"""ComfyUI's `optimized_attention_override`, pointed at split attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from raylight.parallel.attention import Kernel, SequenceAttention

OVERRIDE = "optimized_attention_override"


def install_override(model_options: dict[str, Any], attention: SequenceAttention, kernel: Kernel) -> None:
    """Route every attention call of a model through `attention`, in `model_options` of a patcher.

    An override that is there already stays, as the kernel of each rank: it gets all tokens, of some of the heads.
    """
    options = model_options.setdefault("transformer_options", {})
    present = options.get(OVERRIDE)

    def override(func: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None,
                 attn_precision: Any = None, skip_reshape: bool = False, skip_output_reshape: bool = False,
                 **rest: Any) -> Tensor:
        """q (B, S, H * D), or (B, H, S, D) with `skip_reshape`; returns (B, S, H * D) or (B, H, S, D) likewise."""
        if not skip_reshape:
            width = q.shape[-1] // heads
            # SD3 hands v over with its heads apart already.
            q, k, v = (t.reshape(*t.shape[:2], -1, width).transpose(1, 2) for t in (q, k, v))
        scale = rest.get("scale")

        def chained(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, _: float | None) -> Tensor:
            return present(func, q, k, v, q.shape[1], mask=mask, attn_precision=attn_precision, skip_reshape=True,
                           skip_output_reshape=True, **rest)

        chained.in_order = True  # it may look for tokens by their place
        out = attention(kernel if present is None else chained, q, k, v, mask, scale)
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    options[OVERRIDE] = override
