"""PixArt Alpha and Sigma: one stream of image tokens; text is replicated."""

from raylight.parallel.plan import CrossAttention, Gather, SelfAttention, SequencePlan, Stream

IMAGE = ("img",)

PLANS = (
    SequencePlan(
        model="comfy.ldm.pixart.pixartms.PixArtMS",
        inputs={"blocks.*": {"x": Stream("img")}},
        attention={"blocks.*.attn": SelfAttention(IMAGE), "blocks.*.cross_attn": CrossAttention(IMAGE)},
        outputs={"final_layer": Gather("img")},
        unhooked=("comfy.ldm.pixart.blocks",),
    ),
)
