"""How much system memory there is, and is left: on the machine, or in the container that this process runs in."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

_CGROUP = "/sys/fs/cgroup"


@dataclass(frozen=True, slots=True)
class _Names:
    """Where a version of Linux's control groups has the limit of memory, what of it is used, and what of that."""

    limit: str
    used: str
    stat: str
    cached: tuple[str, ...]  # entries of `stat` whose memory the system takes back before it ends a process


_VERSIONS = (
    _Names("memory.max", "memory.current", "memory.stat", ("active_file", "inactive_file")),
    _Names(
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        ("total_active_file", "total_inactive_file"),
    ),
)


def available_memory() -> int:
    """Return the bytes of memory that this process can still get from the machine, or from its container if less."""
    return min([psutil.virtual_memory().available, *(limit - taken for limit, taken in _limits())])


def total_memory() -> int:
    """Return the bytes of memory of the machine, or of the container if less."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _limits())])


def _limits() -> list[tuple[int, int]]:
    """Return the limit of the container and the bytes that are taken of it for good; nothing without a limit."""
    found = []
    for names in _VERSIONS:
        try:
            limit, used = int(_read(names.limit)), int(_read(names.used))
            stat = dict(line.split() for line in _read(names.stat).splitlines())
            found.append((limit, used - sum(int(stat[name]) for name in names.cached)))
        except (OSError, ValueError, KeyError):  # no container, another version, or "max"
            continue
    return found


def _read(name: str) -> str:
    with open(f"{_CGROUP}/{name}", encoding="ascii") as file:
        return file.read()
