"""How a worker's failure reaches the person at the graph."""

from __future__ import annotations

DIED, HUNG, FAILED, OUT_OF_MEMORY, RAY_LOST = "died", "hung", "failed", "out of memory", "ray lost"


class WorkerError(RuntimeError):
    """A worker failed or died, and the workers have ended. The message names the rank, where it ran, what it did and
    the cause; `kind` is one of this module's."""

    def __init__(self, message: str, kind: str = FAILED) -> None:
        super().__init__(message)
        self.kind = kind


class StoreFull(RuntimeError):
    """What should travel found no room. The workers go on."""


class OutOfMemory(RuntimeError):
    """A rank's memory was exhausted. The message says by what."""


class RunCancelled(BaseException):
    """The run was cancelled, by agreement of all ranks.

    Not an Exception, so that no sampler's `except Exception` can swallow it on some ranks only.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, of PyTorch on any device, or of NCCL says that memory was exhausted."""
    if isinstance(error, (MemoryError, OutOfMemory)) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)
