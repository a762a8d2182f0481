"""Stable Diffusion 3 and 3.5: joint attention over text and image tokens, and in 3.5 Medium one over the image too."""

from __future__ import annotations

from torch import nn

from raylight.parallel.plan import Control, Gather, SelfAttention, SequencePlan, Stream

from . import patches


def image_calls(block: nn.Module) -> int:
    """Return the number of attention calls over the image alone: 1 for the first blocks of 3.5 Medium, else 0."""
    return int(block.x_block.x_block_self_attn)


PLANS = (
    SequencePlan(
        model="comfy.ldm.modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper",
        # A joint block takes `*args`: context and image.
        inputs={"": {"control": Control("img")}, "joint_blocks.*": {0: Stream("txt"), 1: Stream("img")}},
        attention={"joint_blocks.*": (SelfAttention(("txt", "img")), SelfAttention(("img",), calls=image_calls))},
        outputs={"final_layer": Gather("img")},
        patches={"double_block": patches.BLOCKS["double_block"]},
    ),
)
