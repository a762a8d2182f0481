"""Prompts for the demo's model without a text encoder of gigabytes: each word is a vector that its letters decide."""

from __future__ import annotations

import functools
import hashlib
import re

import torch
from torch import Tensor

TOKENS = 12
WIDTH = 128


def encode(prompt: str) -> Tensor:
    """A prompt as (1, tokens, WIDTH), a token for each word and zeros after the last, at least TOKENS of them.

    A token is the word's vector and that of the word before, so that a colour is known to belong to a thing. No prompt
    ("") is zeros alone.
    """
    words = split(prompt)
    tokens = torch.zeros(1, max(TOKENS, len(words)), WIDTH)
    for place, (before, word) in enumerate(zip(["", *words], words, strict=False)):
        tokens[0, place] = torch.cat([_vector(word), _vector(before)])
    return tokens


def split(prompt: str) -> list[str]:
    """The words of a prompt, in small letters."""
    return re.findall(r"[\w']+", prompt.lower())


@functools.cache
def _vector(word: str) -> Tensor:
    """(WIDTH / 2) normal numbers from a seed made of the letters, the same everywhere; zeros for no word."""
    if not word:
        return torch.zeros(WIDTH // 2)
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:7], "big")
    return torch.randn(WIDTH // 2, generator=torch.Generator().manual_seed(seed))
