"""A worker's log, sent to ComfyUI's console and log in place of a file that nobody opens."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .status import LogLine, Status

OUTPUT = "raylight.output"  # the logger of what is printed
_OURS = "raylight."
_FROM_RANK_0_ONLY = ("py.warnings", OUTPUT)


class _Forwarding(logging.Handler):
    """Takes what concerns people. All ranks do the same things: what is no warning is told by rank 0 alone."""

    def __init__(self, status: Status, rank: int) -> None:
        super().__init__()
        self._status, self._rank = status, rank
        self.is_brief = False

    def emit(self, record: logging.LogRecord) -> None:
        if self.is_brief and record.levelno < logging.WARNING and not record.name.startswith(_OURS):
            return
        if self._rank > 0 and logging.DEBUG < record.levelno and (
                record.levelno < logging.WARNING or record.name in _FROM_RANK_0_ONLY):
            return
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip()
        self._status.add(LogLine(record.levelno, record.name, text, self._status.run))


class _Printed:
    """Stands for a stream: each line that is printed becomes a line of the log."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._rest = stream, ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text.replace("\r", "\n")).split("\n")
        for line in lines:
            if line.strip():
                logging.getLogger(OUTPUT).info("%s", line.rstrip())
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def forward(status: Status, rank: int, level: int) -> None:
    """Have all that this process logs from `level` on, and prints, go to `status`."""
    root = logging.getLogger()
    root.addHandler(_Forwarding(status, rank))
    root.setLevel(level)
    logging.captureWarnings(True)
    sys.stdout, sys.stderr = _Printed(sys.stdout), _Printed(sys.stderr)


@contextmanager
def briefly() -> Iterator[None]:
    """Within it, only warnings and Raylight's own lines are sent: what ComfyUI says when it starts, it has said already
    in the process of the person."""
    handlers = [handler for handler in logging.getLogger().handlers if isinstance(handler, _Forwarding)]
    for handler in handlers:
        handler.is_brief = True
    try:
        yield
    finally:
        for handler in handlers:
            handler.is_brief = False


def repeat(line: LogLine, rank: int) -> None:
    """Log, in ComfyUI's process, what a rank has logged."""
    logger = logging.getLogger(line.name)
    if logger.isEnabledFor(line.level):
        logger.log(line.level, "rank %d: %s", rank, line.text)
