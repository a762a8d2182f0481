"""CogVideoX: joint attention over text and video tokens, both split; only video tokens are rotated."""

from raylight.parallel.plan import Aligned, Gather, SelfAttention, SequencePlan, Stream

PLANS = (
    SequencePlan(
        model="comfy.ldm.cogvideo.model.CogVideoXTransformer3DModel",
        inputs={
            "blocks.*": {
                "hidden_states": Stream("img"),
                "encoder_hidden_states": Stream("txt"),
                "image_rotary_emb": Aligned(("img",), dim=0),
            }
        },
        attention={"blocks.*": SelfAttention(("txt", "img"))},
        outputs={"proj_out": Gather("img")},
        heads="num_attention_heads",
    ),
)
