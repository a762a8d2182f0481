"""A program in its own session, which ends together with everything that it started."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

INTERRUPT_PATIENCE = 20.0
TERMINATE_PATIENCE = 5.0
KILL_PATIENCE = 10.0
_MARK = "RAYLIGHT_PROCESS_MARK"
_TICK = 0.05


class ComfyProcess:
    """A running program whose output goes to a file.

    In its own session (POSIX) it does not get a terminal's Ctrl-C, so its owner decides when it ends. The session and a
    mark in the environment identify its processes even after it is dead and they have left its process group (as Ray's
    do). One of the two is not enough: a daemon leaves the session, and a process that changes its title (as Ray's
    workers do) may overwrite its readable environment.
    """

    def __init__(self, command: Sequence[str], *, cwd: Path, environ: Mapping[str, str], log: Path) -> None:
        windows = os.name == "nt"
        self._mark = uuid.uuid4().hex
        with log.open("ab") as output:
            self._process: subprocess.Popen[bytes] = subprocess.Popen(
                list(command),
                cwd=cwd,
                env={**environ, _MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=not windows,
                creationflags=subprocess.CREATE_NEW_PROCESS_GROUP if windows else 0,
            )
        self._stopped = False
        atexit.register(self.stop)

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self) -> int | None:
        """Return its exit code, negative for a signal, or None while it runs.

        It is not reaped where that is possible: until `stop`, no other process can get its number, which is also its
        session's.
        """
        if self._process.returncode is not None or not hasattr(os, "waitid"):
            return self._process.poll()
        result = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if result is None:
            return None
        return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status

    def stop(self) -> None:
        """Interrupt it and wait, then terminate it and wait, then kill what is left of it and of what it started.

        The kill happens even if the wait is interrupted.
        """
        if self._stopped:
            return
        try:
            interrupt = signal.CTRL_BREAK_EVENT if os.name == "nt" else signal.SIGINT
            for number, patience in ((interrupt, INTERRUPT_PATIENCE), (signal.SIGTERM, TERMINATE_PATIENCE)):
                if self.exit_code() is None:
                    os.kill(self.pid, number)
                if self._wait(patience):
                    break
                logger.warning("process %d has not ended %.0f s after signal %d", self.pid, patience, number)
        finally:
            self._kill_rest()
            self._process.wait(KILL_PATIENCE)
            self._stopped = True
            atexit.unregister(self.stop)

    def _wait(self, patience: float) -> bool:
        deadline = time.monotonic() + patience
        while self.exit_code() is None:
            if time.monotonic() > deadline:
                return False
            time.sleep(_TICK)
        return True

    def _kill_rest(self) -> None:
        """Kill all that is left, repeatedly, because a process can fork before it is killed."""
        deadline = time.monotonic() + KILL_PATIENCE
        while left := [process for process in psutil.process_iter() if self._is_ours(process)]:
            if time.monotonic() > deadline:
                logger.warning("processes %s cannot be killed", [process.pid for process in left])
                return
            for process in left:
                try:
                    process.kill()
                except psutil.Error:
                    continue
            time.sleep(_TICK)

    def _is_ours(self, process: psutil.Process) -> bool:
        """Return whether a running process is this one or one of its descendants."""
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            in_session = os.name != "nt" and os.getsid(process.pid) == self.pid
            return in_session or process.environ().get(_MARK) == self._mark
        except (psutil.Error, OSError):
            return False  # it has ended meanwhile, or is another user's
