"""LTX-Video and LTX-2: one stream of video tokens; text and audio, which is short, are replicated."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from raylight.parallel.plan import (
    Aligned,
    Converted,
    CrossAttention,
    FullAttention,
    Gather,
    Gathered,
    SelfAttention,
    SequencePlan,
    Stream,
    TokenLayout,
)

VIDEO = ("video",)
ALIGNED = Aligned(VIDEO)


def dense_mask(mask: Any, _: TokenLayout) -> Tensor | None:
    """Return ComfyUI's `GuideAttentionMask`, which has groups of queries, as one mask (1, 1, S, S) of its dtype."""
    if mask is None:
        return None
    rows = mask.noisy_mask.shape[-1]
    dense = mask.noisy_mask.new_zeros(1, 1, rows, rows)
    stop = mask.guide_start + mask.tracked_count
    dense[..., : mask.guide_start, :] = mask.noisy_mask
    dense[..., mask.guide_start : stop, :] = mask.tracked_mask
    return dense


def timestep_per_frame(timestep: Any, tokens: TokenLayout) -> Any:
    """Return this rank's form of a `CompressedTimestep`, which has one row per frame: a rank may end within a frame."""
    if not hasattr(timestep, "patches_per_frame"):
        return tokens.shard(timestep, ALIGNED)
    ((start, stop),) = tokens.spans(VIDEO, tokens.rank)
    if timestep.data.shape[1] == 1 and timestep.patches_per_frame == 1:
        return timestep
    local = object.__new__(_rows_of(type(timestep)))
    for name in type(timestep).__slots__:
        setattr(local, name, getattr(timestep, name))
    local.rows = torch.arange(start, stop, device=timestep.data.device) // timestep.patches_per_frame
    local.patches_per_frame = 1
    return local


@functools.cache
def _rows_of(compressed: type) -> type:
    class LocalTimestep(compressed):
        def expand_for_computation(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
            return tuple(value.index_select(1, self.rows) for value in super().expand_for_computation(*args, **kwargs))

    return LocalTimestep


PLANS = (
    SequencePlan(
        model="comfy.ldm.lightricks.model.LTXVModel",
        inputs={
            "transformer_blocks.*": {
                "x": Stream("video"),
                "pe": ALIGNED,
                "timestep": ALIGNED,
                "self_attention_mask": Converted(dense_mask),
            }
        },
        attention={
            "transformer_blocks.*.attn1": SelfAttention(VIDEO),
            "transformer_blocks.*.attn2": CrossAttention(VIDEO),
        },
        # The last modulation is done by the model itself, with one row for each token.
        outputs={"norm_out": Gather("video")},
        heads="num_attention_heads",
        patches={"double_block": {"img": ALIGNED}},
    ),
    SequencePlan(
        model="comfy.ldm.lightricks.av_model.LTXAVModel",
        inputs={
            "transformer_blocks.*": {
                "x": Stream("video", index=0),
                "v_pe": ALIGNED,
                "self_attention_mask": Converted(dense_mask),
                **dict.fromkeys(
                    ("v_timestep", "v_cross_scale_shift_timestep", "v_cross_gate_timestep"),
                    Converted(timestep_per_frame),
                ),
            },
            "transformer_blocks.*.audio_to_video_attn": {"pe": ALIGNED},
            "transformer_blocks.*.video_to_audio_attn": {"context": Gathered("video")},
        },
        attention={
            "transformer_blocks.*.attn1": SelfAttention(VIDEO),
            "transformer_blocks.*.attn2": CrossAttention(VIDEO),
            "transformer_blocks.*.audio_to_video_attn": CrossAttention(VIDEO),
            **dict.fromkeys(
                (
                    "transformer_blocks.*.audio_attn1",
                    "transformer_blocks.*.audio_attn2",
                    "transformer_blocks.*.video_to_audio_attn",
                ),
                FullAttention(),
            ),
        },
        outputs={"norm_out": Gather("video")},
        heads="num_attention_heads",
    ),
)
