"""How much system memory is left: on the machine, or in the container that this process runs in."""

from __future__ import annotations

import psutil

_CGROUP = "/sys/fs/cgroup"


def available_memory() -> int:
    """Return the bytes of memory that this process can still get from the machine, or from its container if less."""
    available = psutil.virtual_memory().available
    try:
        limit, used = (int(_read(f"{_CGROUP}/memory.{name}")) for name in ("max", "current"))
        cached = next(
            int(line.split()[1])
            for line in _read(f"{_CGROUP}/memory.stat").splitlines()
            if line.startswith("inactive_file ")
        )
    except (OSError, ValueError, StopIteration):  # no container, or "max"
        return available
    return min(available, limit - used + cached)


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()
