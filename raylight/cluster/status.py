"""What a rank tells of itself while it works: where it is, that it gets on, and what it logs."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

from raylight.parallel import pulse

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
        pulse.beat()
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
            report = Report(self._phase, pulse.beats(), tuple(self._lines))
            self._lines.clear()
            self._told_phase = self._phase
        return report
