"""Hunyuan Video 1.0 and 1.5 and Hunyuan Image 2.1: joint attention over text and image tokens, both split."""

from raylight.parallel.plan import (
    Aligned,
    Control,
    Gather,
    SelfAttention,
    SequencePlan,
    Stream,
    TokenRanges,
    Unsupported,
)

from . import patches

JOINT = ("txt", "img")

PLANS = (
    SequencePlan(
        model="comfy.ldm.hunyuan_video.model.HunyuanVideo",
        inputs={
            "": {
                "control": Control("img"),
                "ref_latent": Unsupported(
                    "a reference latent is cut off by its full length between the blocks and the last layer; "
                    "give the image in another way, or use GPU = 1"
                ),
            },
            "double_blocks.*": {
                "txt": Stream("txt"),
                "img": Stream("img"),
                "pe": Aligned(JOINT, dim=2),
                "modulation_dims_img": TokenRanges(("img",)),
                "modulation_dims_txt": TokenRanges(("txt",)),
            },
            # Ranges of the image, which the model counts from the start of text and image.
            "single_blocks.*": {"pe": Aligned(JOINT, dim=2), "modulation_dims": TokenRanges(JOINT)},
            "final_layer": {"modulation_dims": TokenRanges(("img",))},
        },
        attention={"double_blocks.*": SelfAttention(JOINT), "single_blocks.*": SelfAttention(JOINT)},
        outputs={"final_layer": Gather("img")},
        patches=patches.BLOCKS | patches.ATTENTION,
    ),
)
