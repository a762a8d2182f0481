"""Log messages about files: short, and once for all ranks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

_NAMED = 5  # names that a message lists


def is_worker() -> bool:
    """Return whether this process is a rank, and not ComfyUI's process."""
    return dist.is_available() and dist.is_initialized()


def warn_on_first_rank(logger: logging.Logger, warnings: Iterable[str], name: str) -> None:
    """Log warnings about the file `name` that all ranks have found alike, on rank 0 only."""
    if not is_worker() or dist.get_rank() == 0:
        for warning in warnings:
            logger.warning("%s: %s", name, warning)


def gb(nbytes: int) -> str:
    """Write a number of bytes in GB."""
    return f"{nbytes / 1e9:.2f} GB"


def first_few(names: Iterable[str]) -> str:
    """Return the first names, separated by commas, and how many more there are."""
    names = list(names)
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def captured_log(*starts: str) -> Iterator[list[str]]:
    """Within it, collect what ComfyUI logs in this thread that begins with one of `starts`, instead of logging it.

    ComfyUI logs a line for each tensor, or all names in one line, where Raylight says the same in one sentence.
    """
    captured: list[str] = []
    thread = threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        if record.thread != thread or not record.getMessage().startswith(starts):
            return True
        captured.append(record.getMessage())
        return False

    root = logging.getLogger()  # by which ComfyUI logs
    root.addFilter(passes)
    try:
        yield captured
    finally:
        root.removeFilter(passes)
