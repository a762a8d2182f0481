"""Stable Audio 3: one stream of memory and audio tokens; text is replicated."""

from __future__ import annotations

from torch import Tensor, nn

from raylight.parallel.plan import (
    Aligned,
    Converted,
    CrossAttention,
    Gather,
    SelfAttention,
    SequencePlan,
    Stream,
    TokenLayout,
)

AUDIO = ("audio",)
LAYERS = "transformer.layers"


def for_last_tokens(condition: Tensor | None, tokens: TokenLayout) -> Tensor | None:
    """Return this rank's shard of a condition (B, tokens, width), which lacks rows for the memory tokens before them.

    The shard is (B, at most S_LOCAL, width), of the same dtype.
    """
    if condition is None:
        return None
    ((start, stop),) = tokens.spans(AUDIO, tokens.rank)
    missing = tokens.total(AUDIO) - condition.shape[1]
    # The layer pads a condition with fewer rows than tokens, with zeros at the left.
    return condition[:, max(start - missing, 0) : max(stop - missing, 0)]


def mixes_by_mean(model: nn.Module) -> str | None:
    """Return why Stable Audio 1 cannot be split: it scales differences from the mean of all tokens. None for others."""
    if model.transformer.layers[0].self_attn.feat_scale:
        return "Stable Audio 1 takes a mean over all tokens within its attention; use GPU = 1"
    return None


def attention_calls(attention: nn.Module) -> int:
    """Return 2 for differential attention, the difference of two calls, else 1."""
    return 2 if attention.differential else 1


PLANS = (
    SequencePlan(
        model="comfy.ldm.audio.dit.AudioDiffusionTransformer",
        inputs={
            f"{LAYERS}.*": {
                "x": Stream("audio"),
                "rotary_pos_emb": Aligned(AUDIO, dim=0),
                "local_add_cond": Converted(for_last_tokens),
            }
        },
        attention={
            f"{LAYERS}.*.self_attn": SelfAttention(AUDIO, calls=attention_calls),
            f"{LAYERS}.*.cross_attn": CrossAttention(AUDIO),
        },
        # The model cuts off a number of memory tokens before the last projection.
        outputs={f"{LAYERS}.-1": Gather("audio")},
        heads=f"{LAYERS}.0.self_attn.num_heads",
        patches={"double_block": {"img": Aligned(AUDIO)}},
        refused=mixes_by_mean,
    ),
)
