"""Anonymous files that other processes of this machine can map: in memory if there is room, else on disk.

Such a file disappears with the last process that has it open or mapped, however that process ends. It does not use
/dev/shm, which containers keep small. Other processes open it through this process's list of open files, which the
system allows to the same user only.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref

from raylight.host.log_messages import gb
from raylight.host.machine_memory import available_memory, total_memory

_RESERVE = 0.1  # of the machine's memory stays free


class MemoryFile:
    """A file of `nbytes`, to be written once. `in_memory` says whether it is in memory, `where` says so in words."""

    def __init__(self, name: str, nbytes: int) -> None:
        """Open the file. Raises ValueError if neither memory nor the temporary folder has room for it, or if the system
        is not Linux.
        """
        if not os.path.isdir(f"/proc/{os.getpid()}/fd"):
            raise ValueError("workers can share weights that are in no file only on Linux")
        self.nbytes = nbytes
        self._fd = -1
        free, reserve = available_memory(), int(_RESERVE * total_memory())
        if nbytes + reserve <= free:
            self._open_in_memory(name)
        if self._fd < 0:
            self._open_on_disk(f"{gb(free)} of memory are left, of which {gb(reserve)} stay free")
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
                f"there is no room for {gb(self.nbytes)} of weights that all workers share: {memory}, and {folder} has "
                f"{gb(free)} left. Close other programs, or set TMPDIR to a folder with more room"
            )
        self.in_memory = False
        self.where = f"an unnamed file in {folder}, as memory has too little room ({memory})"
        try:
            self._fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError:  # a file system that has none
            self._fd, path = tempfile.mkstemp(dir=folder)
            os.unlink(path)

    @property
    def path(self) -> str:
        """The path by which other processes of this user can open it, while this process has it open."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def write(self, content: memoryview | bytes, offset: int) -> None:
        """Write bytes at `offset`. Raises OSError."""
        rest = memoryview(content)
        while rest:
            count = os.pwrite(self._fd, rest, offset)
            rest, offset = rest[count:], offset + count

    def finish(self) -> None:
        """Make the file read-only for every process."""
        os.ftruncate(self._fd, self.nbytes)
        os.fchmod(self._fd, 0o400)
        if self.in_memory:
            import fcntl  # absent on Windows, where this module is imported too

            seals = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, seals)

    def close(self) -> None:
        """Close the file; its room is free when no process maps it any more. Happens too when this object is garbage
        collected, and may be repeated.
        """
        self._close()
