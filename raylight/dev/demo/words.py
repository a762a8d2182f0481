"""Prompts for the demo's model without gigabytes of text encoder: a word is a vector computed from its letters."""

from __future__ import annotations

import functools
import hashlib
import re

import torch
from torch import Tensor

TOKENS = 12
WIDTH = 128


def encode(prompt: str) -> Tensor:
    """Encode a prompt as (1, tokens, WIDTH): a token per word, then zeros up to at least TOKENS.

    A token holds the vectors of its word and of the word before, so that a color belongs to a thing. An empty prompt is
    all zeros.
    """
    words = split(prompt)
    tokens = torch.zeros(1, max(TOKENS, len(words)), WIDTH)
    for place, (before, word) in enumerate(zip(["", *words], words, strict=False)):
        tokens[0, place] = torch.cat([_vector(word), _vector(before)])
    return tokens


def split(prompt: str) -> list[str]:
    """Return the words of a prompt in lower case."""
    return re.findall(r"[\w']+", prompt.lower())


@functools.cache
def _vector(word: str) -> Tensor:
    """Return (WIDTH / 2) normal numbers seeded by the letters, the same everywhere; zeros for no word."""
    if not word:
        return torch.zeros(WIDTH // 2)
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:7], "big")
    return torch.randn(WIDTH // 2, generator=torch.Generator().manual_seed(seed))
