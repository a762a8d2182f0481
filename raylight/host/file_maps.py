"""Which file of the machine memory is a map of."""

from __future__ import annotations

import bisect
import os
from collections.abc import Sequence

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
