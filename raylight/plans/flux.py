"""Flux.1 (Dev, Schnell, Kontext, Krea): joint attention over text and image tokens, both split."""

from raylight.parallel.plan import Aligned, Control, Gather, SelfAttention, SequencePlan, Stream, TokenRanges

from . import patches

JOINT = ("txt", "img")

PLANS = (
    SequencePlan(
        model="comfy.ldm.flux.model.Flux",
        inputs={
            "": {"control": Control("img")},
            "double_blocks.*": {
                "txt": Stream("txt"),
                "img": Stream("img"),
                "pe": Aligned(JOINT, dim=2),
                "modulation_dims_img": TokenRanges(("img",)),
            },
            # The model offsets these ranges by the text tokens that it counts after the split.
            "single_blocks.*": {"pe": Aligned(JOINT, dim=2), "modulation_dims": TokenRanges(JOINT, local=("txt",))},
            "final_layer": {"modulation_dims": TokenRanges(("img",))},
        },
        attention={"double_blocks.*": SelfAttention(JOINT), "single_blocks.*": SelfAttention(JOINT)},
        outputs={"final_layer": Gather("img")},
        patches=patches.BLOCKS | patches.ATTENTION,
    ),
)
