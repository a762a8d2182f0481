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


# What NCCL takes of a GPU's memory for one more communicator, and some more.
NCCL_BYTES = 512 * 2**20
_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "cuda_error_out_of_memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
)
_OF_CUDA_IN_NCCL = (
    "unhandled cuda error",
    "unhandled system error",
    "ncclunhandledcudaerror",
    "ncclsystemerror",
    "cuda calloc",
    "cuda malloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, of PyTorch on any device, or of NCCL says that memory was exhausted."""
    if isinstance(error, (MemoryError, OutOfMemory)) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(mark in text for mark in _OF_MEMORY)


def may_be_of_memory(error: BaseException) -> bool:
    """Whether it is an error of NCCL that does not say why CUDA has failed: with a full GPU it is for want of memory,
    which NCCL takes by itself."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and "nccl" in text and any(mark in text for mark in _OF_CUDA_IN_NCCL)
