"""Hunyuan 3D 2.0, mini and 2.1: shape tokens; in 2.0 jointly with the image's, in 2.1 attending to them."""

from raylight.parallel.plan import Aligned, CrossAttention, Gather, SelfAttention, SequencePlan, Stream

from . import patches

JOINT = SelfAttention(("txt", "img"))
SHAPE = ("img",)

PLANS = (
    SequencePlan(
        model="comfy.ldm.hunyuan3d.model.Hunyuan3Dv2",
        inputs={"double_blocks.*": {"txt": Stream("txt"), "img": Stream("img")}},
        attention={"double_blocks.*": JOINT, "single_blocks.*": JOINT},
        outputs={"final_layer": Gather("img")},
        heads="double_blocks.0.num_heads",
        patches=patches.BLOCKS | patches.ATTENTION,
    ),
    SequencePlan(
        model="comfy.ldm.hunyuan3dv2_1.hunyuandit.HunYuanDiTPlain",
        # The skips are outputs of earlier blocks, so they are sharded already.
        inputs={"blocks.*": {"hidden_states": Stream("img")}},
        attention={"blocks.*.attn1": SelfAttention(SHAPE), "blocks.*.attn2": CrossAttention(SHAPE)},
        # The last layer drops the first token, which is the timestep.
        outputs={"blocks.-1": Gather("img")},
        patches={"block": {"x": Aligned(SHAPE), "skip": Aligned(SHAPE)}},
        unhooked=("comfy.ldm.hunyuan3dv2_1.hunyuandit",),
        independent_rows=False,  # it swaps the halves of a batch
    ),
)
