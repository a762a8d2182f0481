"""Memory mappings of this process, as the system tells of them: which file they are of, and whether they are written.

The system makes a page of a private mapping the process's own when it is written to. PyTorch's version counters do not
see what is written by `.data`; this does.
"""

from __future__ import annotations

import bisect
import os
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from torch import Tensor


def one_file_of(tensors: Sequence[Tensor]) -> str | None:
    """The file of which all these tensors are maps, as it is now; None where there is none, or several."""
    maps = _maps()
    starts = [start for start, _, _ in maps]
    found = None
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.numel() == 0:
            return None
        first = tensor.data_ptr()
        at = bisect.bisect_right(starts, first) - 1
        if at < 0 or first + tensor.numel() * tensor.element_size() > maps[at][1] or maps[at][2] is None:
            return None
        if found not in (None, maps[at][2]):
            return None
        found = maps[at][2]
    return found


def _maps() -> list[tuple[int, int, str | None]]:
    """From where to where memory is mapped, by rising addresses, and the file that it is a map of."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
            lines = [line.rstrip("\n").split(None, 5) for line in file]
    except OSError:  # not Linux
        return []
    return [(*(int(one, 16) for one in line[0].split("-")), _file(line)) for line in lines]


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
    """Whether mappings in which these tensors lie have pages of this process's own. False where the system does not
    tell, as it does on Linux only."""
    places = sorted(weight.data_ptr() for weight in weights)
    return any(bisect_left(places, start) < bisect_left(places, stop) for start, stop in _written_mappings())


def _written_mappings() -> Iterator[tuple[int, int]]:
    """Start and stop of the private mappings of files in which pages are this process's own."""
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
