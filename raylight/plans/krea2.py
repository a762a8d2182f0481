"""Krea 2: one stream of text, image and reference tokens."""

from raylight.parallel.plan import Aligned, Gather, SelfAttention, SequencePlan, Stream, TokenIndex

TOKENS = ("tokens",)
PER_HEAD = Aligned(TOKENS, dim=2)

PLANS = (
    SequencePlan(
        model="comfy.ldm.krea2.model.SingleStreamDiT",
        inputs={"blocks.*": {"x": Stream("tokens"), "freqs": PER_HEAD, "timestep_zero_index": TokenIndex("tokens")}},
        attention={"blocks.*": SelfAttention(TOKENS)},
        outputs={"last": Gather("tokens")},
        heads="heads",
        patches={
            "attn1_patch": dict.fromkeys(("q", "k", "v", "pe"), PER_HEAD),
            "attn1_output_patch": {"out": Aligned(TOKENS)},
        },
    ),
)
