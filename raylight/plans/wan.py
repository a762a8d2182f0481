"""Wan 2.1 and 2.2 (T2V, I2V, 5B): one stream of video tokens; text and image context stay whole."""

from raylight.parallel.plan import Aligned, CrossAttention, Gather, SelfAttention, SequencePlan, Stream

PLANS = (
    SequencePlan(
        model="comfy.ldm.wan.model.WanModel",
        inputs={
            "blocks.*": {
                "x": Stream("video"),
                "e": Aligned(("video",), expand=True),
                "freqs": Aligned(("video",)),
            },
            "head": {"e": Aligned(("video",), expand=True)},
        },
        attention={
            "blocks.*.self_attn": SelfAttention(("video",)),
            "blocks.*.cross_attn": CrossAttention(("video",)),
        },
        outputs={"head": Gather("video")},
    ),
)
