"""PixelDiT and PiD: joint attention over text and patch tokens. Every rank does all of the few blocks over pixels,
which pack patches into the batch.
"""

from raylight.parallel.plan import Aligned, FullAttention, Gather, SelfAttention, SequencePlan, Stream


def pixeldit(model: str, gathered: str) -> SequencePlan:
    """Return the plan of a PixelDiT, whose tokens are gathered after the module `gathered`."""
    return SequencePlan(
        model=f"comfy.ldm.pixeldit.{model}",
        inputs={
            "patch_blocks.*": {
                "x": Stream("img"),
                "y": Stream("txt"),
                "pos_img": Aligned(("img",), dim=0),
                "pos_txt": Aligned(("txt",), dim=0),
            }
        },
        attention={"patch_blocks.*": SelfAttention(("txt", "img")), "pixel_blocks.*": FullAttention()},
        outputs={gathered: Gather("img", index=0)},
        heads="num_groups",
    )


PLANS = (
    pixeldit("model.PixDiT_T2I", "patch_blocks.-1"),
    # PiD adds image features to the full tokens before every block.
    pixeldit("pid.PidNet", "patch_blocks.*"),
)
