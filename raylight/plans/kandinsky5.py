"""Kandinsky 5: one stream of image or video tokens; text is replicated."""

from raylight.parallel.plan import Aligned, CrossAttention, Gather, SelfAttention, SequencePlan, Stream

VISUAL = ("visual",)
BLOCKS = "visual_transformer_blocks"

PLANS = (
    SequencePlan(
        model="comfy.ldm.kandinsky5.model.Kandinsky5",
        inputs={f"{BLOCKS}.*": {"visual_embed": Stream("visual"), "freqs": Aligned(VISUAL)}},
        attention={
            f"{BLOCKS}.*.self_attention": SelfAttention(VISUAL),
            f"{BLOCKS}.*.cross_attention": CrossAttention(VISUAL),
        },
        # The last layer puts the full tokens back on their grid.
        outputs={f"{BLOCKS}.-1": Gather("visual")},
        heads=f"{BLOCKS}.0.self_attention.num_heads",
    ),
)
