"""A guard for the day that ComfyUI is killed: ends what Ray would leave behind.

Ray's workers die with their driver, but two of its helper processes stay for minutes when the driver
gets no chance to shut down. The guard is a child that waits for the other end of a pipe to close.
"""

from __future__ import annotations

import logging
import subprocess
import sys

import psutil

logger = logging.getLogger(__name__)

GRACE_S = 3.0


def family() -> frozenset[str]:
    """The processes that this one has started, and theirs, by number and time of birth."""
    return frozenset(f"{child.pid}:{child.create_time()}" for child in psutil.Process().children(recursive=True))


def guard(others: frozenset[str]) -> subprocess.Popen:
    """Start a guard over the processes that this one has started but for `others`, which are not Ray's; they end when
    it ends, however it ends.

    The guard goes by itself when its standard input is closed.
    """
    return subprocess.Popen(
        [sys.executable, __file__, *sorted(family() - others)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )


def _find(names: list[str]) -> list[psutil.Process]:
    """The processes of those names that still run; a number that was given to another process is not one."""
    found = []
    for name in names:
        pid, created = name.split(":")
        try:
            process = psutil.Process(int(pid))
            if process.create_time() == float(created):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def _main(names: list[str]) -> None:
    sys.stdin.buffer.read()  # returns when the last holder of the pipe is gone
    _, left = psutil.wait_procs(_find(names), timeout=GRACE_S)
    for process in left:
        process.kill()


if __name__ == "__main__":
    _main(sys.argv[1:])
