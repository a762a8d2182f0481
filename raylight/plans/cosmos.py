"""Cosmos 1.0, Cosmos Predict2 and Anima: one stream of video tokens on a grid; text is replicated."""

from raylight.parallel.plan import Aligned, CrossAttention, Gather, SelfAttention, SequencePlan, Stream

VIDEO = ("video",)
TOKENS = Aligned(VIDEO)
PER_FRAME = Aligned(VIDEO, expand=True)


def predict2(model: str) -> SequencePlan:
    """Return the plan of a model with the blocks of Cosmos Predict 2."""
    modulation = {"adaln_lora_B_T_3D": PER_FRAME}
    return SequencePlan(
        model=model,
        inputs={
            "blocks.*": {
                "x_B_T_H_W_D": Stream("video", grid=3),
                "rope_emb_L_1_1_D": TOKENS,
                "emb_B_T_D": PER_FRAME,
                **modulation,
            },
            "final_layer": {"emb_B_T_D": PER_FRAME, **modulation},
        },
        attention={"blocks.*.self_attn": SelfAttention(VIDEO), "blocks.*.cross_attn": CrossAttention(VIDEO)},
        outputs={"final_layer": Gather("video")},
        patches={
            "attn1_patch": {"q": TOKENS, "k": TOKENS, "v": TOKENS},
            "attn2_patch": {"q": TOKENS},
            "mlp_patch": {"x": TOKENS},
        },
    )


PLANS = (
    SequencePlan(
        model="comfy.ldm.cosmos.model.GeneralDIT",
        inputs={"blocks.block*": {"x": Stream("video", dim=0, grid=3), "rope_emb_L_1_1_D": Aligned(VIDEO, dim=0)}},
        # Attention within the video, then to the text.
        attention={"blocks.block*.blocks.0": SelfAttention(VIDEO), "blocks.block*.blocks.1": CrossAttention(VIDEO)},
        # The model itself adds position embeddings to the full tokens before every block.
        outputs={"blocks.block*": Gather("video", dim=0)},
    ),
    predict2("comfy.ldm.cosmos.predict2.MiniTrainDIT"),
    predict2("comfy.ldm.anima.model.Anima"),
)
