"""Prompts as vectors, alone and through ComfyUI's own text node."""

from __future__ import annotations

import torch

import nodes
from raylight.dev.demo.clip import word_clip
from raylight.dev.demo.words import TOKENS, WIDTH, encode, split


def test_word_vector_is_reproducible() -> None:
    # Recorded on one machine: a machine with other numbers could not use the trained model.
    expected = torch.tensor([-0.8487, 0.4598, 0.3634, 0.9882])
    assert torch.allclose(encode("red")[0, 0, :4], expected, atol=1e-4)


def test_token_includes_previous_word() -> None:
    tokens = encode("a Red, house")
    assert tokens.shape == (1, TOKENS, WIDTH)
    assert torch.equal(tokens[0, 1, WIDTH // 2 :], tokens[0, 0, : WIDTH // 2])
    assert torch.equal(tokens[0, 1, : WIDTH // 2], encode("red")[0, 0, : WIDTH // 2])
    assert not tokens[0, 2].equal(encode("a blue house")[0, 2])
    assert not tokens[0, 3:].any()


def test_empty_prompt_is_zeros() -> None:
    assert not encode("").any()


def test_long_prompt_is_not_cut() -> None:
    text = " ".join("word" for _ in range(TOKENS + 5))
    assert encode(text).shape == (1, TOKENS + 5, WIDTH) and len(split(text)) == TOKENS + 5


def test_comfyui_encodes_text() -> None:
    (conditioning,) = nodes.CLIPTextEncode().encode(word_clip(), "a red house")
    assert len(conditioning) == 1
    assert torch.equal(conditioning[0][0].cpu(), encode("a red house"))
