"""What a person is told of files, in few words and once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

_NAMED = 5  # so many of many names are told


def is_rank() -> bool:
    """Whether this process is one of several that do the same for ComfyUI's."""
    return dist.is_available() and dist.is_initialized()


def tell(logger: logging.Logger, warnings: Iterable[str], name: str) -> None:
    """Warn of what all ranks find alike about a file, once: the first rank does."""
    if not is_rank() or dist.get_rank() == 0:
        for warning in warnings:
            logger.warning("%s: %s", name, warning)


def some(names: Iterable[str]) -> str:
    """The first of some names, and how many more there are."""
    names = list(names)
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def held_back(*starts: str) -> Iterator[list[str]]:
    """Within it, what ComfyUI logs in this thread that begins with one of `starts` is collected and not logged.

    ComfyUI logs a line for each tensor, or all names in one line, where Raylight says the same in one sentence.
    """
    held: list[str] = []
    thread = threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        if record.thread != thread or not record.getMessage().startswith(starts):
            return True
        held.append(record.getMessage())
        return False

    root = logging.getLogger()  # by which ComfyUI logs
    root.addFilter(passes)
    try:
        yield held
    finally:
        root.removeFilter(passes)
