"""ACE-Step 1.5: one stream of audio tokens, in every other layer within a window; text and lyrics are replicated."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raylight.parallel.plan import Aligned, CrossAttention, Gather, SelfAttention, SequencePlan, Stream

AUDIO = ("audio",)
LAYERS = "decoder.layers"


def window(attention: nn.Module, tokens: int, q: Tensor) -> Tensor | None:
    """Return the mask (1, 1, S, S), of q's dtype, that limits attention to `sliding_window` tokens away, or None."""
    if attention.sliding_window is None:
        return None
    positions = torch.arange(tokens, device=q.device)
    far = (positions[:, None] - positions).abs() > attention.sliding_window
    return torch.zeros(1, 1, tokens, tokens, dtype=q.dtype, device=q.device).masked_fill_(far, torch.finfo(q.dtype).min)


PLANS = (
    SequencePlan(
        model="comfy.ldm.ace.ace_step15.AceStepConditionGenerationModel",
        inputs={f"{LAYERS}.*": {"hidden_states": Stream("audio"), "position_embeddings": Aligned(AUDIO, dim=-2)}},
        attention={
            f"{LAYERS}.*.self_attn": SelfAttention(AUDIO, mask=window),
            f"{LAYERS}.*.cross_attn": CrossAttention(AUDIO),
        },
        outputs={"decoder.norm_out": Gather("audio")},
        heads=f"{LAYERS}.0.self_attn.num_heads",
        unhooked=("comfy.ldm.ace.ace_step15",),
        independent_rows=False,  # it gives the reference audio of all rows to the first
    ),
)
