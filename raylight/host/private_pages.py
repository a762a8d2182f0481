"""Which weights that are mapped from their file this process has written to, as the system tells.

The system makes a page of a private mapping the process's own when it is written to. PyTorch's version counters do not
see what is written by `.data`; this does.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

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
