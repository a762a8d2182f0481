"""What a rank tells of itself while it works: where it is, that it gets on, and what it logs."""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from raylight.parallel import heartbeat

STARTING, IDLE = "starting", "waiting for work"
_MOST_LINES = 500  # between two reports; what a rank logs beyond that is lost, oldest first


@dataclass(frozen=True, slots=True)
class LogLine:
    """One record of Python's logging. `run` is the run that was the rank's last when it was made, empty before the
    first."""

    level: int
    name: str
    text: str
    run: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """A rank's word: its phase, how often its pulse has beaten, and what it has logged since its last report."""

    phase: str
    beats: int
    lines: tuple[LogLine, ...]


class Status:
    """The state of one rank. Written by the thread that works, read by the one that reports."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._phase, self._told_phase = STARTING, ""
        self._lines: deque[LogLine] = deque(maxlen=_MOST_LINES)
        self.run = ""

    def enter(self, phase: str) -> None:
        """Say what begins now; it reads well behind "in" or "while"."""
        heartbeat.beat()
        with self._changed:
            self._phase = phase
            self._changed.notify_all()

    def add(self, line: LogLine) -> None:
        """Take a line for the next report."""
        with self._changed:
            self._lines.append(line)
            self._changed.notify_all()

    def report(self, patience_s: float) -> Report:
        """What is new since the last report, at once when something is, else after `patience_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._phase != self._told_phase, patience_s)
            report = Report(self._phase, heartbeat.beats(), tuple(self._lines))
            self._lines.clear()
            self._told_phase = self._phase
        return report


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
        if (
            self._rank > 0
            and logging.DEBUG < record.levelno
            and (record.levelno < logging.WARNING or record.name in _FROM_RANK_0_ONLY)
        ):
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
