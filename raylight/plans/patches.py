"""What ComfyUI's patches are given, by the kinds of model: arguments that are tokens, whatever the patch does."""

from raylight.parallel.plan import Aligned

TXT, IMG, JOINT = Aligned(("txt",)), Aligned(("img",)), Aligned(("txt", "img"))
JOINT_HEADS = Aligned(("txt", "img"), dim=2)

BLOCKS = {"double_block": {"img": IMG, "txt": TXT}, "single_block": {"img": JOINT}}
# q, k and v are (B, heads, tokens, width) of text and image together.
ATTENTION = {
    "attn1_patch": {"q": JOINT_HEADS, "k": JOINT_HEADS, "v": JOINT_HEADS, "pe": JOINT_HEADS},
    "attn1_output_patch": {"out": JOINT},
}
