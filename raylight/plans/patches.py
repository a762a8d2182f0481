"""Rules for the arguments of ComfyUI's patches that have one row per token, as several families share them."""

from raylight.parallel.plan import Aligned

TXT, IMG, JOINT = Aligned(("txt",)), Aligned(("img",)), Aligned(("txt", "img"))
JOINT_HEADS = Aligned(("txt", "img"), dim=2)

BLOCKS = {"double_block": {"img": IMG, "txt": TXT}, "single_block": {"img": JOINT}}
# q, k and v are (B, H, tokens, D) of text and image together.
ATTENTION = {
    "attn1_patch": {"q": JOINT_HEADS, "k": JOINT_HEADS, "v": JOINT_HEADS, "pe": JOINT_HEADS},
    "attn1_output_patch": {"out": JOINT},
}
