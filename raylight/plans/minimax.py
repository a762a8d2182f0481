"""MiniMax H3: one packed sequence of text, condition, audio and video tokens, without a batch."""

from raylight.parallel.plan import Aligned, Gather, SelfAttention, SequencePlan, Stream, TokenRanges

TOKENS = ("tokens",)

PLANS = (
    SequencePlan(
        model="comfy.ldm.minimax.model.MiniMaxH3Model",
        inputs={
            "blocks.*": {
                "x": Stream("tokens", dim=0),
                "mod_segments": TokenRanges(TOKENS),
                "rope_freqs": Aligned(TOKENS),
            }
        },
        attention={"blocks.*": SelfAttention(TOKENS)},
        # The last layer takes audio and video by their positions in the full sequence.
        outputs={"blocks.-1": Gather("tokens", dim=0)},
        heads="blocks.0.attn.heads",
        patches={"double_block": {"img": Aligned(TOKENS, dim=0)}},
    ),
)
