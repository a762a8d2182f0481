"""Ernie Image: one stream of image and text tokens."""

from raylight.parallel.plan import Aligned, Gather, SelfAttention, SequencePlan, Stream

TOKENS = ("tokens",)

PLANS = (
    SequencePlan(
        model="comfy.ldm.ernie.model.ErnieImageModel",
        inputs={"layers.*": {"x": Stream("tokens"), "rotary_pos_emb": Aligned(TOKENS)}},
        attention={"layers.*": SelfAttention(TOKENS)},
        outputs={"final_linear": Gather("tokens")},
        unhooked=("comfy.ldm.ernie.model",),
    ),
)
