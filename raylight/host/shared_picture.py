"""A picture in memory that ComfyUI's process and the workers of its machine share: each rank writes its rows.

ComfyUI's process makes the file, without a size, and sends its path. Rank 0 gives it the size of the picture, which is
known when the first rows are there. Pages take memory when they are written to.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import sys
import weakref

import torch
from torch import Tensor


class PictureFile:
    """An anonymous file in memory. It is gone when this object and all tensors on it are."""

    def __init__(self) -> None:
        """Open the file. Raises OSError: this system has none."""
        if not sys.platform.startswith("linux"):
            raise OSError("files in memory that other processes can map are there on Linux only")
        self._fd = os.memfd_create("raylight picture", os.MFD_CLOEXEC)
        os.fchmod(self._fd, 0o600)
        self._close = weakref.finalize(self, os.close, self._fd)

    @property
    def path(self) -> str:
        """The path by which other processes of this user can open it, while this object is there."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def picture(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return what the ranks have written, a tensor on the file's memory."""
        return _mapped(self._fd, shape, dtype)

    def close(self) -> None:
        """Close the file; tensors on it stay. Happens too when this object is garbage collected."""
        self._close()


def new_picture(is_local: bool) -> PictureFile | None:
    """Return a file for workers of this machine, None where they cannot map it."""
    if is_local:
        with contextlib.suppress(OSError, AttributeError):  # of a system, or a container's rules, without it
            return PictureFile()
    return None


def resize_picture(path: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Give the file room for a picture. For one rank, before others open it. Raises OSError."""
    os.truncate(path, _nbytes(shape, dtype))


def open_picture(path: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the picture of another process, a tensor on the file's memory. Raises OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return _mapped(fd, shape, dtype)
    finally:
        os.close(fd)


def _mapped(fd: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(fd, _nbytes(shape, dtype)), dtype=dtype).view(shape)


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize
