"""A guard for the day that ComfyUI is killed: ends what Ray would leave behind.

Ray's workers die with their driver, but two of its helper processes stay for minutes when the driver
gets no chance to shut down. The guard is a child that waits for the other end of a pipe to close.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence

import psutil

GRACE_S = 3.0
_THEN = "--"  # between folders and processes in the guard's arguments


def child_process_ids() -> frozenset[str]:
    """The processes that this one has started, and theirs, by number and time of birth."""
    return frozenset(process_ids(psutil.Process().children(recursive=True)))


def process_ids(processes: Iterable[psutil.Process]) -> Iterator[str]:
    """The numbers and times of birth of those that run."""
    for process in processes:
        try:
            yield f"{process.pid}:{process.create_time()}"
        except psutil.NoSuchProcess:
            continue


def guard(others: frozenset[str], folders: Sequence[str]) -> subprocess.Popen:
    """Start a guard over the processes that this one has started but for `others`, which are not Ray's; they and what
    they start end when it ends, however it ends, and the folders of their files go.

    The guard goes by itself when its standard input is closed.
    """
    return subprocess.Popen(
        [sys.executable, __file__, *folders, _THEN, *sorted(child_process_ids() - others)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def find(names: Iterable[str]) -> list[psutil.Process]:
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


def _with_children(processes: list[psutil.Process]) -> list[psutil.Process]:
    found = dict.fromkeys(processes)
    for process in processes:
        try:
            found |= dict.fromkeys(process.children(recursive=True))
        except psutil.NoSuchProcess:
            continue
    return list(found)


def _main(folders: Sequence[str], names: Sequence[str]) -> None:
    sys.stdin.buffer.read()  # returns when the last holder of the pipe is gone
    _, left = psutil.wait_procs(_with_children(find(names)), timeout=GRACE_S)
    for process in left:
        process.kill()
    psutil.wait_procs(left, timeout=GRACE_S)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _at = sys.argv.index(_THEN)
    _main(sys.argv[1:_at], sys.argv[_at + 1 :])
