"""The demo's words as a CLIP of ComfyUI: a tokenizer and a text model, as comfy.sd.CLIP expects them."""

from __future__ import annotations

from typing import Any

import comfy.sd
import torch
from comfy.supported_models_base import ClipTarget
from torch import Tensor, nn

from .words import encode


class WordTokenizer:
    """Leave the prompt as it is, because the encoder reads words. Weights such as "(this:1.2)" are not supported."""

    def __init__(self, embedding_directory: str | None = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        pass

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **options: Any) -> dict[str, str]:
        return {"words": text}

    def state_dict(self) -> dict[str, Tensor]:
        return {}


class WordEncoder(nn.Module):
    """Encode a prompt as (1, words, width), without trained weights (words.py)."""

    def __init__(
        self,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        model_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.dtypes = {torch.float32}

    def set_clip_options(self, options: dict[str, Any]) -> None:
        pass

    def reset_clip_options(self) -> None:
        pass

    def encode_token_weights(self, tokens: dict[str, str]) -> tuple[Tensor, None]:
        return encode(tokens["words"]), None


def word_clip() -> comfy.sd.CLIP:
    """Return a CLIP for ComfyUI's text nodes."""
    return comfy.sd.CLIP(ClipTarget(WordTokenizer, WordEncoder))
