"""Write tensors of ComfyUI's process to a file in memory that all workers of this machine can map."""

from __future__ import annotations

from collections.abc import Iterable

import comfy.model_management
from torch import Tensor

from raylight.cluster.serialization import as_bytes

from .memory_file import MemoryFile


def write_tensors(what: str, header: bytes, tensors: Iterable[tuple[int, Tensor]], nbytes: int) -> MemoryFile:
    """Return a finished file of a header and `nbytes` behind it: tensors, each at its offset there. `what` has them.

    Raises ValueError if there is no room, or if the file cannot be written; ComfyUI's interrupt if the user cancels.
    """
    file = MemoryFile(f"raylight {what}", len(header) + nbytes)
    try:
        file.write(header, 0)
        for offset, value in tensors:
            comfy.model_management.throw_exception_if_processing_interrupted()
            file.write(as_bytes(value).data, len(header) + offset)
        file.finish()
    except OSError as error:
        file.close()
        raise ValueError(f"the weights of the {what} cannot be written to {file.where}: {error}") from error
    except BaseException:
        file.close()
        raise
    return file
