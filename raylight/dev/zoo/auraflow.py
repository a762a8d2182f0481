"""AuraFlow."""

from __future__ import annotations

from typing import Any

import torch

from .family import Draw, Family
from .patched import patched, replaced_block

BASE = {
    "max_seq": 256,
    "cond_seq_dim": 24,
    "n_double_layers": 2,
    "n_layers": 4,
    "dim": 80,
    "n_heads": 5,
    "global_conddim": 80,
}


def text(draw: Draw) -> dict[str, Any]:
    return {"x": draw(2, 4, 17, 13), "t": torch.tensor([0.7, 0.2]), "c_crossattn": draw(2, 7, 24)}


FAMILIES = (
    Family(
        "AuraFlow",
        "AuraFlow",
        BASE,
        {
            "text, batch of two": text,
            "replaced blocks": patched(
                text, {("double_block", 0): replaced_block, ("single_block", 1): replaced_block}
            ),
        },
    ),
)
