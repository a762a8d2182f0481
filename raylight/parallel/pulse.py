"""The pulse of this rank: that it gets on, seen from outside, and where it may be stopped."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

_beats = 0
_check: Callable[[], None] | None = None


def beat() -> None:
    """Say that this rank gets on. Called where ranks meet."""
    global _beats
    _beats += 1


def beats() -> int:
    """How often `beat` was called in this process: what stands still, hangs."""
    return _beats


def checkpoint() -> None:
    """A place where all ranks may agree to stop. Collective: every rank comes to the same ones in the same order.

    Raises what the caller of `checked_by` had raised; does nothing outside of it.
    """
    beat()
    if _check is not None:
        _check()


@contextmanager
def checked_by(check: Callable[[], None]):
    """Within it, `checkpoint` calls `check`."""
    global _check
    before, _check = _check, check
    try:
        yield
    finally:
        _check = before
