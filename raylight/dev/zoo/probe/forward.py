"""The record of one forward of a model that may be on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raylight.plans.draft.record import Record, recording


def record(model: Any, inputs: dict[str, Any]) -> Record:
    """Run `apply_model` once. Attention is not computed: its result is empty."""

    def override(_: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *rest: Any, **options: Any) -> Tensor:
        if options.get("skip_reshape"):
            result.attended(q, k)
            if not options.get("skip_output_reshape"):
                return q.new_zeros(q.shape[0], q.shape[2], q.shape[1] * v.shape[3])
        else:
            # Its shapes only: keys may have another width. (B, S, H * D) -> (B, H, S, D)
            result.attended(*(t.new_empty(t.shape[0], heads, t.shape[1], 1) for t in (q, k)))
        return torch.zeros_like(q)

    with recording(model.diffusion_model) as result, torch.inference_mode():
        model.apply_model(**inputs, transformer_options={"optimized_attention_override": override})
    return result
