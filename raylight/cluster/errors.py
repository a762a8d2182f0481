"""Errors that reach the user from the workers, and which errors mean that memory ran out."""

from __future__ import annotations

DIED, HUNG, FAILED, OUT_OF_MEMORY, RAY_LOST = "died", "hung", "failed", "out of memory", "ray lost"
CRASHED, MACHINE_LOST = "crashed", "machine lost"


class WorkerError(RuntimeError):
    """A worker failed or died, and the workers have ended.

    The message names the rank, where it ran, its phase, the root cause and the remedies. `kind` is one of this
    module's constants. Of memory that ran out, the rank held `spare_bytes` only to be faster.
    """

    def __init__(self, message: str, kind: str = FAILED, spare_bytes: int = 0) -> None:
        super().__init__(message)
        self.kind, self.spare_bytes = kind, spare_bytes


class StoreFull(RuntimeError):
    """Ray's object store is full. The workers stay."""


class OutOfMemory(RuntimeError):
    """A rank ran out of memory. The message names what it held; `spare_bytes` of it only to be faster."""

    def __init__(self, message: str, spare_bytes: int = 0) -> None:
        super().__init__(message, spare_bytes)  # both, or a copy in another process would lack one
        self.spare_bytes = spare_bytes

    def __str__(self) -> str:
        return self.args[0]


class RunCancelled(BaseException):
    """The run was cancelled, by agreement of all ranks.

    Not an Exception, so that no sampler's `except Exception` can swallow it on some ranks only.
    """


def raise_cancelled() -> None:
    """Raise RunCancelled."""
    raise RunCancelled


# What NCCL takes of a GPU's memory for one more communicator, with a margin.
NCCL_BYTES = 512 * 2**20
_MEMORY_MARKS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "cuda_error_out_of_memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
)
_NCCL_CUDA_MARKS = (
    "unhandled cuda error",
    "unhandled system error",
    "ncclunhandledcudaerror",
    "ncclsystemerror",
    "cuda calloc",
    "cuda malloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of Python, NCCL, or PyTorch on any device says that memory ran out."""
    if isinstance(error, (MemoryError, OutOfMemory)) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and _has_mark(error, _MEMORY_MARKS)


def may_be_out_of_memory(error: BaseException) -> bool:
    """Return whether it is an error of NCCL that does not say why CUDA failed.

    On a full GPU the reason is memory, which NCCL allocates by itself.
    """
    return isinstance(error, RuntimeError) and "nccl" in str(error).lower() and _has_mark(error, _NCCL_CUDA_MARKS)


def _has_mark(error: BaseException, marks: tuple[str, ...]) -> bool:
    text = str(error).lower()
    return any(mark in text for mark in marks)
