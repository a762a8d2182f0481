"""Rounding of sizes to multiples."""

from __future__ import annotations


def aligned(nbytes: int, to: int) -> int:
    """Return the next multiple of `to` from `nbytes` on."""
    return -(-nbytes // to) * to
