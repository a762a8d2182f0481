"""Mochi: joint attention over video tokens and the text tokens that are not padding."""

from raylight.parallel.plan import Aligned, Gather, SelfAttention, SequencePlan, Stream, TokenPrefix

from . import patches

PER_TOKEN = Aligned(("img",), dim=0)

PLANS = (
    SequencePlan(
        model="comfy.ldm.genmo.joint_model.asymm_models_joint.AsymmDiTJoint",
        inputs={
            "blocks.*": {
                "x": Stream("img"),
                "y": Stream("txt"),
                "crop_y": TokenPrefix("txt", "prompt"),
                "rope_cos": PER_TOKEN,
                "rope_sin": PER_TOKEN,
            }
        },
        attention={"blocks.*": SelfAttention(("img", "prompt"))},
        outputs={"final_layer": Gather("img")},
        patches={"double_block": patches.BLOCKS["double_block"]},
    ),
)
