"""JoyImage Edit: joint attention over image, reference and text tokens; only the first two are rotated."""

from raylight.parallel.plan import Aligned, Gather, SelfAttention, SequencePlan, Stream

from . import patches

PLANS = (
    SequencePlan(
        model="comfy.ldm.joyimage.model.JoyImageTransformer3DModel",
        inputs={
            "double_blocks.*": {
                "hidden_states": Stream("img"),
                "encoder_hidden_states": Stream("txt"),
                "image_rotary_emb": Aligned(("img",)),
            }
        },
        attention={"double_blocks.*": SelfAttention(("img", "txt"))},
        # The model cuts off reference tokens before the last layer.
        outputs={"double_blocks.-1": Gather("img", index=0)},
        heads="double_blocks.0.attn.num_attention_heads",
        patches={"double_block": patches.BLOCKS["double_block"]},
    ),
)
