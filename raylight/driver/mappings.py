"""Memory mappings of this process, as Linux reports them: of which files they are, and whether they were written to.

A write to a page of a private mapping makes the page the process's own. So this finds writes by `.data` too, which
PyTorch's version counters miss.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from torch import Tensor


def one_file_of(tensors: Sequence[Tensor]) -> str | None:
    """Return the one file that all these tensors map; None if there is none, if there are several, or if it was
    replaced since.
    """
    maps = _maps()
    starts = [start for start, _, _ in maps]
    found = None
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.numel() == 0:
            return None
        first = tensor.data_ptr()
        at = bisect_right(starts, first) - 1
        if at < 0 or first + tensor.numel() * tensor.element_size() > maps[at][1] or maps[at][2] is None:
            return None
        if found not in (None, maps[at][2]):
            return None
        found = maps[at][2]
    return found


def _maps() -> list[tuple[int, int, str | None]]:
    """Return start, stop and file of each mapping, by rising addresses."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
            lines = [line.rstrip("\n").split(None, 5) for line in file]
    except OSError:  # not Linux
        return []
    bounds = [line[0].split("-") for line in lines]
    return [(int(start, 16), int(stop, 16), _file(line)) for (start, stop), line in zip(bounds, lines, strict=True)]


def _file(line: list[str]) -> str | None:
    if len(line) < 6 or not line[5].startswith("/"):
        return None
    path, inode = line[5], int(line[4])
    try:
        return path if os.stat(path).st_ino == inode else None
    except OSError:  # removed, or replaced by another
        return None


_MAPPING = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) .*/")


def are_written(weights: Iterable[Tensor]) -> bool:
    """Return whether any of these tensors is in a mapping of a file that was written to. False on other systems than
    Linux.
    """
    places = sorted(weight.data_ptr() for weight in weights)
    return any(bisect_left(places, start) < bisect_left(places, stop) for start, stop in _written_mappings())


def _written_mappings() -> Iterator[tuple[int, int]]:
    """Yield start and stop of the mappings of files in which this process has pages of its own."""
    try:
        text = Path("/proc/self/smaps").read_bytes()
    except OSError:
        return
    start = stop = 0
    for line in text.splitlines():
        if line[:1] in b"0123456789abcdef":
            found = _MAPPING.match(line)
            start, stop = (0, 0) if found is None else (int(one, 16) for one in found.groups())
        elif stop and line.startswith(b"Anonymous:") and int(line.split()[1]):
            yield start, stop
