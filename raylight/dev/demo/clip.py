"""The demo's words as a CLIP of ComfyUI: a tokenizer and a text model, of the shape that comfy.sd.CLIP asks for."""

from __future__ import annotations

from typing import Any

import comfy.sd
import torch
from comfy.supported_models_base import ClipTarget
from torch import Tensor, nn

from .words import encode


class WordTokenizer:
    """Leaves the prompt as it is: the encoder reads words. It knows no weights of words, "(like this:1.2)"."""

    def __init__(self, embedding_directory: str | None = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        pass

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **options: Any) -> dict[str, str]:
        return {"words": text}

    def state_dict(self) -> dict[str, Tensor]:
        return {}


class WordEncoder(nn.Module):
    """(1, words, width) of a prompt, without weights: words.py says how."""

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
    """A CLIP for ComfyUI's text nodes."""
    return comfy.sd.CLIP(ClipTarget(WordTokenizer, WordEncoder))
