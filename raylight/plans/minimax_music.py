"""MiniMax Music 3: one stream of a time token and audio tokens, window by window if the music is long."""

from __future__ import annotations

from raylight.parallel.plan import Aligned, Gather, SelfAttention, SequencePlan, Stream

AUDIO = ("audio",)
LAYERS = "diffusion_transformer.transformer.layers"

PLANS = (
    SequencePlan(
        model="comfy.ldm.minimax_music.dit.MiniMaxMusic3DiT",
        # (1, 1, S, D/2, 2, 2)
        inputs={f"{LAYERS}.*": {"x": Stream("audio"), "rotation_matrix": Aligned(AUDIO, dim=2)}},
        attention={f"{LAYERS}.*.self_attn": SelfAttention(AUDIO)},
        # The model takes the time token off before its last projection.
        outputs={f"{LAYERS}.-1": Gather("audio")},
        heads=f"{LAYERS}.0.self_attn.num_heads",
        unhooked=("comfy.ldm.minimax_music.dit",),
    ),
)
