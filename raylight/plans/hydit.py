"""Hunyuan DiT: one stream of image tokens with skips between its halves; text is replicated."""

from raylight.parallel.plan import Aligned, Control, CrossAttention, Gather, SelfAttention, SequencePlan, Stream

IMAGE = ("img",)

PLANS = (
    SequencePlan(
        model="comfy.ldm.hydit.models.HunYuanDiT",
        # The skips are outputs of earlier blocks, so they are sharded already.
        inputs={
            "": {"control": Control("img")},
            "blocks.*": {"x": Stream("img"), "freq_cis_img": Aligned(IMAGE, dim=0)},
        },
        attention={"blocks.*.attn1": SelfAttention(IMAGE), "blocks.*.attn2": CrossAttention(IMAGE)},
        outputs={"final_layer": Gather("img")},
        patches={"double_block": {"img": Aligned(IMAGE), "skip": Aligned(IMAGE)}},
        unhooked=("comfy.ldm.hydit.attn_layers",),
    ),
)
