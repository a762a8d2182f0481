"""What a rank reports while it works: its phase, its heartbeat and its log."""

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
STEP = "step"  # the phases of a sampler's steps start with it, and no others
VAE = ("decoding", "encoding")  # so start the phases in which a VAE computes, and no others
_MAX_LINES = 500  # between two reports; of more lines the oldest are lost


@dataclass(frozen=True, slots=True)
class LogLine:
    """One record of Python's logging. `run` is the id of the rank's last run when it was made, "" before the first."""

    level: int
    name: str
    text: str
    run: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """A rank's phase, its number of heartbeats, what rises while its host or its GPU makes progress, and what it has
    logged since its last report.
    """

    phase: str
    beats: int
    progress: int
    lines: tuple[LogLine, ...]


class Status:
    """The state of one rank, written by its working thread and read by its reporting thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._phase, self._reported_phase = STARTING, ""
        self._lines: deque[LogLine] = deque(maxlen=_MAX_LINES)
        self.run = ""

    @property
    def phase(self) -> str:
        """What the rank is doing."""
        return self._phase

    def enter(self, phase: str) -> None:
        """Set the phase; it must read well after "while"."""
        heartbeat.beat()
        with self._changed:
            self._phase = phase
            self._changed.notify_all()

    def add(self, line: LogLine) -> None:
        """Add a line to the next report."""
        with self._changed:
            self._lines.append(line)
            self._changed.notify_all()

    def report(self, patience_s: float) -> Report:
        """Return what is new since the last report, as soon as there is something, at the latest after `patience_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._phase != self._reported_phase, patience_s)
            report = Report(self._phase, heartbeat.beats(), heartbeat.progress(), tuple(self._lines))
            self._lines.clear()
            self._reported_phase = self._phase
        return report


OUTPUT = "raylight.output"  # the logger of what is printed
_OWN_LOGGERS = "raylight."
_RANK_0_ONLY = ("py.warnings", OUTPUT)


class _ReportHandler(logging.Handler):
    """Adds log records to a rank's reports. All ranks do the same, so only rank 0 reports less than warnings."""

    def __init__(self, status: Status, rank: int) -> None:
        super().__init__()
        self._status, self._rank = status, rank
        self.is_brief = False

    def emit(self, record: logging.LogRecord) -> None:
        if self.is_brief and record.levelno < logging.WARNING and not record.name.startswith(_OWN_LOGGERS):
            return
        is_routine = record.levelno < logging.WARNING or record.name in _RANK_0_ONLY
        if self._rank > 0 and record.levelno > logging.DEBUG and is_routine:
            return
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip()
        self._status.add(LogLine(record.levelno, record.name, text, self._status.run))


class _LoggedStream:
    """A stream whose lines are logged instead of printed."""

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


def report_logs(status: Status, rank: int, level: int) -> None:
    """Send what this process prints, and logs at `level` or above, to `status`."""
    root = logging.getLogger()
    root.addHandler(_ReportHandler(status, rank))
    root.setLevel(level)
    logging.captureWarnings(True)
    sys.stdout, sys.stderr = _LoggedStream(sys.stdout), _LoggedStream(sys.stderr)


@contextmanager
def brief_logs() -> Iterator[None]:
    """Report only warnings and Raylight's own lines: ComfyUI has logged the rest when its own process started."""
    handlers = [handler for handler in logging.getLogger().handlers if isinstance(handler, _ReportHandler)]
    for handler in handlers:
        handler.is_brief = True
    try:
        yield
    finally:
        for handler in handlers:
            handler.is_brief = False


def repeat(line: LogLine, rank: int) -> None:
    """Log a rank's line in ComfyUI's process."""
    logger = logging.getLogger(line.name)
    if logger.isEnabledFor(line.level):
        logger.log(line.level, "rank %d: %s", rank, line.text)
