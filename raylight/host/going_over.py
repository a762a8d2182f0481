"""Runs that go over to the workers at their first forward.

Caching packs put a forward of their own into the model from a wrapper around each step, and both parts keep what they
know of the run where both see it: on the model, in a closure, in their Python module. Such a run is right only where
all of the pack's code is in one process, and it is not known before the wrapper has run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_waiting = False


class GoOver(BaseException):
    """Ends a run in this process, which the workers are to do as a whole. No error, so no handler of errors may stop
    it. `whole` is as in `Inside`."""

    def __init__(self, whole: str) -> None:
        self.whole = whole


@contextmanager
def at_first_forward() -> Iterator[None]:
    """Within it the run may go over. Raises GoOver."""
    global _waiting
    _waiting = True
    try:
        yield
    finally:
        _waiting = False


def meet(whole: str) -> None:
    """To be called before a forward is sent. Raises GoOver where the run may and, by its first forward, has to."""
    global _waiting
    if _waiting and whole:
        raise GoOver(whole)
    _waiting = False
