"""Lumina 2 and Z-Image: image tokens in the refiner, then one stream of text, vision and image tokens."""

from raylight.parallel.plan import Aligned, Gather, Input, SelfAttention, SequencePlan, Stream, TokenRanges


def layer(stream: str) -> dict[str, Input]:
    """Return the rules of a block whose tokens are `stream`."""
    return {"x": Stream(stream), "freqs_cis": Aligned((stream,)), "timestep_zero_index": TokenRanges((stream,))}


def lumina(model: str, inputs: dict, outputs: dict) -> SequencePlan:
    """Return the plan of a model of the Lumina family, which differ in what is around the blocks."""
    return SequencePlan(
        model=f"comfy.ldm.lumina.model.{model}",
        inputs={"noise_refiner.*": layer("img"), "layers.*": layer("tokens"), **inputs},
        attention={"noise_refiner.*": SelfAttention(("img",)), "layers.*": SelfAttention(("tokens",))},
        # Patches between the layers get slices of full tokens.
        outputs={
            "noise_refiner.*": Gather("img", patched="noise_refiner"),
            "noise_refiner.-1": Gather("img"),
            "layers.*": Gather("tokens", patched="double_block"),
            **outputs,
        },
        heads="layers.0.attention.n_local_heads",
    )


PLANS = (
    lumina(
        "NextDiT", {"final_layer": {"timestep_zero_index": TokenRanges(("tokens",))}}, {"final_layer": Gather("tokens")}
    ),
    # Its decoder takes the hidden states of image tokens by position.
    lumina("NextDiTPixelSpace", {}, {"layers.-1": Gather("tokens")}),
)
