"""Wan 2.1 and 2.2: one stream of video, reference and pose tokens; text, image and audio context are replicated."""

from raylight.parallel.plan import (
    Aligned,
    CrossAttention,
    Gather,
    GatherAround,
    Input,
    SelfAttention,
    SequencePlan,
    Stream,
)

VIDEO = ("video",)
TOKENS_OF_VIDEO = Aligned(VIDEO)
TOKENS: dict[str, Input] = {"x": Stream("video"), "freqs": TOKENS_OF_VIDEO}
PER_FRAME = Aligned(VIDEO, expand=True)
ATTENTION = {"blocks.*.self_attn": SelfAttention(VIDEO), "blocks.*.cross_attn": CrossAttention(VIDEO)}


def wan(
    model: str,
    inputs: dict[str, dict[str, Input]] | None = None,
    attention: dict | None = None,
    modulation_per_frame: bool = True,
    heads: tuple[str, ...] = ("head",),
) -> SequencePlan:
    """Return the plan that all Wan models share, with additions.

    Without `modulation_per_frame` the modulation is (B, 6, width), the same for all tokens.
    """
    modulation: dict[str, Input] = {"e": PER_FRAME} if modulation_per_frame else {}
    return SequencePlan(
        model=f"comfy.ldm.wan.{model}",
        inputs={"blocks.*": TOKENS | modulation, **({"head": modulation} if modulation else {}), **(inputs or {})},
        attention=ATTENTION | (attention or {}),
        outputs=dict.fromkeys(heads, Gather("video")),
        patches={
            "double_block": {"img": TOKENS_OF_VIDEO},
            "attn2_patch": {"x": TOKENS_OF_VIDEO},
            "attn1_patch": dict.fromkeys(("x", "q", "k"), TOKENS_OF_VIDEO),
        },
    )


PLANS = (
    wan("model.WanModel"),
    wan("model.SCAILWanModel"),
    wan("model.SCAIL2WanModel"),
    wan("model.CameraWanModel", modulation_per_frame=False),
    wan(
        "model.VaceWanModel",
        # The first block gets the full context and video, as they are before any block.
        {"vace_blocks.0": {"c": Aligned(VIDEO), "x": Aligned(VIDEO)}, "vace_blocks.*": {"freqs": TOKENS_OF_VIDEO}},
        {"vace_blocks.*.self_attn": SelfAttention(VIDEO), "vace_blocks.*.cross_attn": CrossAttention(VIDEO)},
        modulation_per_frame=False,
    ),
    # Attention to audio is per frame, and a rank's tokens may end within a frame.
    wan("model.WanModel_S2V", {"audio_injector": {"x": GatherAround("video")}}),
    wan("model.HumoWanModel", {"blocks.*.audio_cross_attn_wrapper": {"x": GatherAround("video")}}),
    wan("model_animate.AnimateWanModel", {"face_adapter.fuser_blocks.*": {"x": GatherAround("video")}}),
    wan(
        "model_wandancer.WanDancerModel",
        {"music_injector": {"x": GatherAround("video")}, "head_global": {"e": PER_FRAME}},
        heads=("head", "head_global"),
    ),
)
