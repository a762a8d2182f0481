"""Lens: joint attention over image and text tokens, in this order."""

from raylight.parallel.plan import Aligned, Control, Gather, SelfAttention, SequencePlan, Stream

from . import patches

JOINT = ("img", "txt")

PLANS = (
    SequencePlan(
        model="comfy.ldm.lens.model.LensTransformer2DModel",
        inputs={
            "": {"control": Control("img")},
            "transformer_blocks.*": {
                "hidden_states": Stream("img"),
                "encoder_hidden_states": Stream("txt"),
                "freqs_cis": Aligned(JOINT, dim=2),
                # The block compares the mask's length with its number of tokens.
                "attention_mask": Aligned(JOINT, dim=3),
            },
        },
        attention={"transformer_blocks.*": SelfAttention(JOINT)},
        outputs={"proj_out": Gather("img")},
        heads="transformer_blocks.0.attn.heads",
        patches={"double_block": patches.BLOCKS["double_block"]},
    ),
)
