"""A guard process that ends Ray's processes if ComfyUI's process is killed.

Ray's workers die with their driver, but two of its helper processes stay for minutes if the driver could not shut
down. The guard waits for the other end of a pipe to close.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence

import psutil

GRACE_S = 3.0
_SEPARATOR = "--"  # between folders and processes in the guard's arguments


def child_process_ids() -> frozenset[str]:
    """Return the ids of all descendants of this process."""
    return frozenset(process_ids(psutil.Process().children(recursive=True)))


def children_named(prefixes: tuple[str, ...], foreign_ids: frozenset[str]) -> dict[str, psutil.Process]:
    """Return the children of this process whose names begin so, by name, without `foreign_ids`.

    Those may be of another Ray, which a program that was started here has; and a ComfyUI that has restarted in its own
    process, as ComfyUI-Manager has it do, still has the dead children of the one before.
    """
    found = {}
    for child in psutil.Process().children():
        name = name_of(child)
        if name.startswith(prefixes) and foreign_ids.isdisjoint(process_ids([child])):
            found[name] = child
    return found


def name_of(process: psutil.Process) -> str:
    """Return the name of a process, "" if it has gone."""
    try:
        return process.name()
    except psutil.Error:
        return ""


def is_running(process: psutil.Process) -> bool:
    """Return whether a process runs. One that has ended stays a zombie until its parent asks for its exit code."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def process_ids(processes: Iterable[psutil.Process]) -> Iterator[str]:
    """Return "pid:creation time" of the processes that run. Unlike a pid, it is never reused."""
    for process in processes:
        try:
            yield f"{process.pid}:{process.create_time()}"
        except psutil.NoSuchProcess:
            continue


def start(foreign_ids: frozenset[str], folders: Sequence[str]) -> subprocess.Popen:
    """Start a guard process. When this process exits for any reason, it kills this one's descendants except
    `foreign_ids`, and deletes `folders`. It exits when its standard input is closed.
    """
    return subprocess.Popen(
        [sys.executable, __file__, *folders, _SEPARATOR, *sorted(child_process_ids() - foreign_ids)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def find(ids: Iterable[str]) -> list[psutil.Process]:
    """Return the processes with these ids that still run."""
    found = []
    for pid, created in (process_id.split(":") for process_id in ids):
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


def _main(folders: Sequence[str], ids: Sequence[str]) -> None:
    sys.stdin.buffer.read()  # returns when the pipe's other end is closed
    _, left = psutil.wait_procs(_with_children(find(ids)), timeout=GRACE_S)
    for process in left:
        process.kill()
    psutil.wait_procs(left, timeout=GRACE_S)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _at = sys.argv.index(_SEPARATOR)
    _main(sys.argv[1:_at], sys.argv[_at + 1 :])
