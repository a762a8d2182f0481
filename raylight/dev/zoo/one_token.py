"""The situation of an empty prompt: a text of one token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .family import Draw, Family

NAME = "text of one token"

# Inputs with text tokens, by token dimension.
_TOKENS = {"c_crossattn": 1, "attention_mask": 1, "lyric_embed": 1, "encoder_hidden_states_llama3": 2}
# These models take a text of one length only, and masks mark its real tokens.
_PADDED = {
    "GenmoMochi": ("attention_mask",),
    **dict.fromkeys(("HunyuanDiT", "HunyuanDiT1"), ("text_embedding_mask", "text_embedding_mask_t5")),
}
# Additional tokens: quoted words and a picture, which are not in every prompt.
_BESIDE = {
    "HunyuanVideo15": ("txt_byt5", "clip_fea"),
    "HunyuanVideo15_SR_Distilled": ("txt_byt5", "clip_fea"),
    "HunyuanImage21": ("txt_byt5",),
}


def one_token(family: Family) -> dict[str, Callable[[Draw], dict[str, Any]]]:
    """Return a family's first call with a text of one token; none if that call has no text."""
    first = next(iter(family.calls.values()))
    if "c_crossattn" not in first(Draw(3)):
        return {}
    config = family.config

    def call(draw: Draw) -> dict[str, Any]:
        inputs = {name: value for name, value in first(draw).items() if name not in _BESIDE.get(config, ())}
        if config in _PADDED:
            inputs.update((name, _first_only(inputs[name])) for name in _PADDED[config])
        else:
            inputs.update(
                (name, value.narrow(_TOKENS[name], 0, 1))
                for name, value in inputs.items()
                if name in _TOKENS and value is not None
            )
        return inputs | ({"num_tokens": 1} if "num_tokens" in inputs else {})

    return {NAME: call}


def _first_only(mask: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(mask[:, :1]), torch.zeros_like(mask[:, 1:])], 1)
