"""LTX-2's text encoder: short prompts, and a narrow output in the place of a projection of 722 million weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy.text_encoders import llama, lt

WIDTH = 32  # that of the test's model
_LAYERS = 49


def install(fill: Callable[[torch.nn.Module], None]) -> None:
    llama.GEMMA3_VISION_CONFIG.update(num_hidden_layers=1, intermediate_size=64)
    made, tokenizer_made = lt.LTXAVTEModel.__init__, lt.Gemma3_12BTokenizer.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.text_embedding_projection = _Projection()
        fill(self.text_embedding_projection)

    def tokenizer(self: Any, *args: Any, **kwargs: Any) -> None:
        tokenizer_made(self, *args, **kwargs)
        self.min_length = 1  # it pads to 1024 tokens, and leaves them out of its result

    lt.LTXAVTEModel.__init__ = __init__
    lt.Gemma3_12BTokenizer.__init__ = tokenizer


class _Projection(torch.nn.Module):
    """Take the mean of all layers, (B, S, width * layers), and make it narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(WIDTH, 3840))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x.unflatten(-1, (-1, _LAYERS)).mean(-1), self.weight)
