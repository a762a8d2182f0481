"""Calls of the families in which a stream has one token: the text, and for some the image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matrix_cases import Calls

from raylight.dev.zoo.family import Draw, Family
from raylight.dev.zoo.one_token import NAME, one_token

PICTURE = "picture and text of one token"

# Latents of one patch, of batches as the families' first calls have them.
_LATENTS = {
    "Flux Schnell": (1, 16, 2, 2),
    "Chroma": (1, 16, 2, 2),
    "Wan T2V": (1, 16, 1, 2, 2),
    "Lumina 2": (2, 16, 2, 2),
    "SD3.5 Medium": (2, 16, 2, 2),
    "Qwen Image": (1, 16, 1, 2, 2),
}


def calls_of(family: Family) -> Calls:
    """Return the calls of this family with a stream of one token."""
    calls = one_token(family)
    if family.name in _LATENTS:
        calls[PICTURE] = _with_latent(calls[NAME], _LATENTS[family.name])
    return calls


def every_call(family: Family) -> Calls:
    """Return the calls of this family, and those with a stream of one token."""
    return {**family.calls, **calls_of(family)}


def _with_latent(call: Callable[[Draw], dict[str, Any]], shape: tuple[int, ...]) -> Callable[[Draw], dict[str, Any]]:
    return lambda draw: call(draw) | {"x": draw(*shape)}
