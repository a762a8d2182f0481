"""ACE-Step 1.5."""

from __future__ import annotations

from typing import Any

import torch

from .family import Draw, Family

BASE = {
    "audio_model": "ace1.5",
    "in_channels": 192,
    "hidden_size": 80,
    "text_hidden_dim": 24,
    "num_dit_layers": 2,
    "num_lyric_layers": 1,
    "num_timbre_layers": 1,
    "num_tokenizer_layers": 1,
    "num_heads": 10,
    "num_kv_heads": 5,
    "head_dim": 16,
    "intermediate_size": 96,
    "sliding_window": 8,
    "fsq_dim": 80,
    "encoder_hidden_size": 80,
    "encoder_intermediate_size": 96,
    "encoder_num_heads": 5,
}


def song(draw: Draw) -> dict[str, Any]:
    return {
        "x": draw(2, 64, 75),
        "t": torch.tensor([0.7, 0.2]),
        "c_crossattn": draw(2, 9, 24),
        "lyric_embed": draw(2, 5, 24),
        "refer_audio": draw(2, 64, 75),
        "is_covers": False,
    }


FAMILIES = (Family("ACE-Step 1.5", "ACEStep15", BASE, {"text and lyrics, batch of two": song}),)
