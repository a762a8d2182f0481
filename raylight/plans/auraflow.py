"""AuraFlow: joint attention over text (with its register tokens) and image tokens, both split."""

from raylight.parallel.plan import Gather, SelfAttention, SequencePlan, Stream

from . import patches

JOINT = SelfAttention(("txt", "img"))

PLANS = (
    SequencePlan(
        model="comfy.ldm.aura.mmdit.MMDiT",
        inputs={"double_layers.*": {"c": Stream("txt"), "x": Stream("img")}},
        attention={"double_layers.*": JOINT, "single_layers.*": JOINT},
        # The model itself applies the last modulation, one row for all tokens.
        outputs={"final_linear": Gather("img")},
        heads="double_layers.0.attn.n_heads",
        patches=patches.BLOCKS,
    ),
)
