"""Files without a name, in memory where there is room, for what other processes of this machine are to map.

Such a file is gone with the last process that has it open or mapped, however that ends, so nothing is left behind. It
takes no place from /dev/shm, which containers keep small. Others open it as what this process has open, which the
system allows to the same user only.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref

import psutil

_RESERVE = 0.1  # of the machine's memory stays free
_CGROUP = "/sys/fs/cgroup"


class MemoryFile:
    """A file to be written once, from its beginning, of `nbytes`. `in_memory` tells where it is, `where` says it."""

    def __init__(self, name: str, nbytes: int) -> None:
        """Raises ValueError where neither memory nor the temporary folder has room for it, or where the system has no
        such files."""
        if not os.path.isdir(f"/proc/{os.getpid()}/fd"):
            raise ValueError("only on Linux can workers share weights that are in no file")
        self.nbytes = nbytes
        self._fd = -1
        free, reserve = available_memory(), int(_RESERVE * psutil.virtual_memory().total)
        if nbytes + reserve <= free:
            self._open_in_memory(name)
        if self._fd < 0:
            self._open_on_disk(f"{_gb(free)} of memory are left, of which {_gb(reserve)} are kept free")
        self._close = weakref.finalize(self, os.close, self._fd)
        os.fchmod(self._fd, 0o600)

    def _open_in_memory(self, name: str) -> None:
        try:
            self._fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except (OSError, AttributeError):  # a kernel, or a container's rules, without it
            return
        self.in_memory, self.where = True, "shared memory"

    def _open_on_disk(self, memory: str) -> None:
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
        if self.nbytes > free:
            raise ValueError(
                f"there is no room for {_gb(self.nbytes)} of weights that all workers are to share: "
                f"{memory}, and {folder} has {_gb(free)} left. Close programs, or set TMPDIR to a folder "
                f"with more room"
            )
        self.in_memory = False
        self.where = f"a file without a name in {folder}, as memory has too little room ({memory})"
        try:
            self._fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError:  # a file system that has none
            self._fd, path = tempfile.mkstemp(dir=folder)
            os.unlink(path)

    @property
    def path(self) -> str:
        """Where other processes of this user on this machine find it, while this process has it open."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def write(self, content: memoryview | bytes, offset: int) -> None:
        """Write bytes. Raises OSError."""
        rest = memoryview(content)
        while rest:
            count = os.pwrite(self._fd, rest, offset)
            rest, offset = rest[count:], offset + count

    def finish(self) -> os.stat_result:
        """Nothing is to be changed in it any more, by whomever. Returns what it is."""
        os.ftruncate(self._fd, self.nbytes)
        os.fchmod(self._fd, 0o400)
        if self.in_memory:
            import fcntl  # not everywhere, and this module is imported everywhere

            seals = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, seals)
        return os.fstat(self._fd)

    def close(self) -> None:
        """Give it back, once no process maps it any more; when this object is gone, that is done too. Harmless when
        repeated."""
        self._close()


def available_memory() -> int:
    """Bytes of memory that this process can still have: of the machine, or of its container where that has less."""
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


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
