"""Qwen Image, Edit and Layered, and Mage-Flow, which has the same blocks: joint attention over text and image tokens,
both split.
"""

from dataclasses import replace

from raylight.parallel.plan import Aligned, Control, Gather, SelfAttention, SequencePlan, Stream, TokenIndex

from . import patches

JOINT = ("txt", "img")

QWEN_IMAGE = SequencePlan(
    model="comfy.ldm.qwen_image.model.QwenImageTransformer2DModel",
    inputs={
        "": {"control": Control("img")},
        "transformer_blocks.*": {
            "hidden_states": Stream("img"),
            "encoder_hidden_states": Stream("txt"),
            "encoder_hidden_states_mask": Aligned(("txt",)),
            "image_rotary_emb": Aligned(JOINT, dim=2),
            "timestep_zero_index": TokenIndex("img"),
        },
    },
    attention={"transformer_blocks.*": SelfAttention(JOINT)},
    outputs={"proj_out": Gather("img")},
    patches=patches.BLOCKS | patches.ATTENTION,
    heads="transformer_blocks.0.num_attention_heads",
)

PLANS = (QWEN_IMAGE, replace(QWEN_IMAGE, model="comfy.ldm.mage_flow.model.MageFlowTransformer2DModel"))
