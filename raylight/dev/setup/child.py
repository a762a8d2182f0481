"""Run the demo or the tests so that Ctrl-C reaches them once, and wait for their clean-up."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import FrameType


def run_child(command: list[str], cwd: Path, environ: Mapping[str, str]) -> int:
    """Run a command to its end and return its exit code, or 128 + n if signal n ended it, as a shell does.

    SIGINT and SIGTERM do not end this process. They are passed on, except a SIGINT that the terminal has already sent
    to the child: a second one would interrupt the clean-up after the first.
    """
    received: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        if process is None:
            received.append(number)
        elif number != signal.SIGINT or not _terminal_signals_group():
            process.send_signal(number)

    # A handler and not SIG_IGN, which the child would inherit.
    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        process = subprocess.Popen(command, cwd=cwd, env=dict(environ))
        for number in received:
            pass_on(number, None)
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _terminal_signals_group() -> bool:
    """Return whether Ctrl-C comes from a terminal, which also sends it to the child, as it is in the same group."""
    if os.name == "nt":
        return True
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
