"""Ideogram 4: one stream of text and image tokens, or of image tokens alone."""

from raylight.parallel.plan import Aligned, Gather, SelfAttention, SequencePlan, Stream

TOKENS = ("tokens",)

PLANS = (
    SequencePlan(
        model="comfy.ldm.ideogram4.model.Ideogram4Transformer2DModel",
        inputs={"layers.*": {"x": Stream("tokens"), "freqs_cis": Aligned(TOKENS)}},
        attention={"layers.*": SelfAttention(TOKENS)},
        outputs={"final_layer": Gather("tokens")},
        heads="layers.0.attention.num_heads",
    ),
)
