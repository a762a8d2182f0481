"""What workers of this machine have printed, in the files that Ray keeps of it."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence

_CRASHED = "Fatal Python error: "  # the stack of a crash by `faulthandler` begins so
_LAST_BYTES, _LAST_LINES = 1 << 16, 12
_STACK_LINES = 12
_RAY_MARKS = (":job_id:", ":actor_name:", ":task_name:")  # for Ray's own reader of these files
_RAY_REPEATS = " logging.cc:"  # the lines of a crash that Ray has printed before
_THIS_THREAD = "Current thread "


def output_sizes(folder: str | None, pid: int) -> dict[str, int]:
    """Return how many bytes a worker of this machine has printed, by file in Ray's log `folder`."""
    # The folder's path may contain characters that are patterns for `glob`.
    paths = glob.glob(os.path.join(glob.escape(folder), f"worker-*-{pid}.err")) if folder else ()
    return {path: os.path.getsize(path) for path in paths}


def printed_since(folder: str | None, pid: int, before: Mapping[str, int]) -> list[str]:
    """Return the lines that a worker of this machine has printed since `before`, the last ones if they are many."""
    lines: list[str] = []
    for path, size in output_sizes(folder, pid).items():
        with open(path, "rb") as file:
            file.seek(max(before.get(path, 0), size - _LAST_BYTES))
            lines += file.read().decode(errors="replace").splitlines()
    return [line for line in lines if line.strip() and not line.startswith(_RAY_MARKS)]


def crash_in(lines: Sequence[str]) -> tuple[str, ...]:
    """Return the lines about a crash among those that a worker has printed, () if there was none: what was printed
    just before, the kind of crash, and the stack of the thread that crashed.
    """
    start = next((index for index, line in enumerate(lines) if line.startswith(_CRASHED)), None)
    if start is None:
        return ()
    before = [line for line in lines[:start] if _RAY_REPEATS not in line]
    return (*before[-_LAST_LINES:], lines[start], *_stack_in(lines[start + 1 :]))


def kind_of_crash(lines: Sequence[str]) -> str:
    """Return which crash these lines are about, such as "Segmentation fault"; "" if they are about none."""
    return next((line.removeprefix(_CRASHED) for line in lines if line.startswith(_CRASHED)), "")


def last_lines_of(lines: Sequence[str]) -> tuple[str, ...]:
    """Return the last lines of what a worker has printed."""
    return tuple(lines[-_LAST_LINES:])


def _stack_in(lines: Sequence[str]) -> Iterator[str]:
    """Give the stack of the thread that crashed, the innermost frames first; nothing if it was no thread of Python."""
    start = next((index for index, line in enumerate(lines) if line.startswith(_THIS_THREAD)), None)
    if start is None:
        return
    yield lines[start]
    for line in lines[start + 1 : start + 1 + _STACK_LINES]:
        if not line.startswith(" "):
            return
        yield line
