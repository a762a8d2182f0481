"""How a worker's failure reaches the person at the graph."""

from __future__ import annotations


class WorkerError(RuntimeError):
    """A worker failed or died. The message names the rank, where it ran, and the cause."""


class RunCancelled(BaseException):
    """The run was cancelled, by agreement of all ranks.

    Not an Exception, so that no sampler's `except Exception` can swallow it on some ranks only.
    """
