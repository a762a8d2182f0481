"""OmniGen 2 and Boogu: image and reference tokens in their refiners, then text and image tokens together."""

from raylight.parallel.plan import Aligned, Gather, Input, SelfAttention, SequencePlan, Stream

JOINT = ("txt", "img")


def layer(*streams: str) -> dict[str, Input]:
    """Return the rule of what is aligned with the tokens of a block: its position table."""
    return {"image_rotary_emb": Aligned(streams)}


def refiners() -> tuple[dict, dict, dict]:
    """Return inputs, attention and outputs of the refiners, whose tokens are gathered after the last one."""
    inputs, attention, outputs = {}, {}, {}
    for path, stream in (("noise_refiner", "noise"), ("ref_image_refiner", "reference")):
        inputs[f"{path}.*"] = {"hidden_states": Stream(stream), **layer(stream)}
        attention[f"{path}.*"] = SelfAttention((stream,))
        outputs[f"{path}.-1"] = Gather(stream)
    return inputs, attention, outputs


INPUTS, ATTENTION, OUTPUTS = refiners()

PLANS = (
    SequencePlan(
        model="comfy.ldm.omnigen.omnigen2.OmniGen2Transformer2DModel",
        inputs=INPUTS | {"layers.*": {"hidden_states": Stream("tokens"), **layer("tokens")}},
        attention=ATTENTION | {"layers.*": SelfAttention(("tokens",))},
        outputs=OUTPUTS | {"norm_out": Gather("tokens")},
        heads="layers.0.attn.heads",
    ),
    SequencePlan(
        model="comfy.ldm.boogu.model.BooguTransformer2DModel",
        inputs=INPUTS
        | {
            "double_stream_layers.*": {
                "img_hidden_states": Stream("img"),
                "instruct_hidden_states": Stream("txt"),
                "joint_rotary_emb": Aligned(JOINT),
                "img_rotary_emb": Aligned(("img",)),
            },
            "single_stream_layers.*": layer(*JOINT),
        },
        attention=ATTENTION
        | {
            "double_stream_layers.*.img_instruct_attn": SelfAttention(JOINT),
            "double_stream_layers.*.img_self_attn": SelfAttention(("img",)),
            "single_stream_layers.*": SelfAttention(JOINT),
        },
        # The model takes the last tokens, by the image's full length.
        outputs=OUTPUTS | {"norm_out": Gather("img", after=("txt",))},
        heads="single_stream_layers.0.attn.heads",
    ),
)
