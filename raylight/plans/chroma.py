"""Chroma and Chroma Radiance: as Flux, with modulation by a separate network, the same for all tokens."""

from raylight.parallel.plan import Aligned, Control, Gather, Input, SelfAttention, SequencePlan, Stream

from . import patches

JOINT = ("txt", "img")
INPUTS: dict[str, dict[str, Input]] = {
    "": {"control": Control("img")},
    "double_blocks.*": {"txt": Stream("txt"), "img": Stream("img"), "pe": Aligned(JOINT, dim=2)},
    "single_blocks.*": {"pe": Aligned(JOINT, dim=2)},
}
ATTENTION = {"double_blocks.*": SelfAttention(JOINT), "single_blocks.*": SelfAttention(JOINT)}

PLANS = (
    SequencePlan(
        "comfy.ldm.chroma.model.Chroma",
        INPUTS,
        ATTENTION,
        {"final_layer": Gather("img")},
        patches=patches.BLOCKS | patches.ATTENTION,
    ),
    # Its last layers combine the patches of the full image, by convolution too.
    SequencePlan(
        "comfy.ldm.chroma_radiance.model.ChromaRadiance",
        INPUTS,
        ATTENTION,
        {"single_blocks.-1": Gather("img", after=("txt",))},
        patches=patches.BLOCKS | patches.ATTENTION,
    ),
)
