"""HiDream: joint attention over image and text tokens. Every block gets different text, so text is gathered between
blocks.
"""

from raylight.parallel.plan import Aligned, Gather, SelfAttention, SequencePlan, Stream

JOINT = ("img", "txt")
ROPE = {"rope": Aligned(JOINT)}

PLANS = (
    SequencePlan(
        model="comfy.ldm.hidream.model.HiDreamImageTransformer2DModel",
        inputs={
            "double_stream_blocks.*": {"image_tokens": Stream("img"), "text_tokens": Stream("txt"), **ROPE},
            "single_stream_blocks.*": {"image_tokens": Stream("txt", after=("img",)), **ROPE},
        },
        attention=dict.fromkeys(("double_stream_blocks.*", "single_stream_blocks.*"), SelfAttention(JOINT)),
        outputs={
            "double_stream_blocks.*": Gather("txt", index=1),
            "single_stream_blocks.*": Gather("txt", after=("img",)),
            "final_layer": Gather("img"),
        },
        heads="num_attention_heads",
    ),
)
