"""Where the files of a Ray of one's own lie, for this user alone.

The system allows paths of sockets of about a hundred bytes, and Ray adds some sixty to the name of its folder. Where
that of the person is too long, or has letters that Ray cannot send, Ray gets a link to it by a short name.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "RAY_TMPDIR"
_LEAST_FREE_BYTES = 100_000_000
_INSIDE = "r"  # Ray opens its folder to all users, so it is inside of one that is not
_SOCKET_BYTES = 103 if sys.platform == "darwin" else 107
_OF_RAY = "/session_2026-01-01_00-00-00_000000_{pid}/sockets/plasma_store"
_SHORT_ROOTS = ("/tmp", "/var/tmp", "/dev/shm")
_OF_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR)


class NoFolder(OSError):
    """Ray's files find no place. The message says why, and what to do."""


@dataclass(frozen=True, slots=True)
class RayFolder:
    """`path` is what Ray is given; `own` are the folders that go when Ray ends."""

    path: str
    own: tuple[str, ...]

    def remove(self) -> None:
        for folder in self.own:
            shutil.rmtree(folder, ignore_errors=True)


def root() -> str:
    """Where Ray's files go. On POSIX not to TMPDIR, whose paths are long on many machines."""
    return os.environ.get(VARIABLE) or ("/tmp" if os.name == "posix" else tempfile.gettempdir())


def most_bytes() -> int:
    """How long the name of the folder that Ray is given may be."""
    return _SOCKET_BYTES - len(_OF_RAY.format(pid=os.getpid()))


def fits(path: str) -> bool:
    """Whether Ray can have its sockets in a folder of this name."""
    return os.name != "posix" or (path.isascii() and len(os.fsencode(path)) <= most_bytes())


def make() -> RayFolder:
    """A new folder in `root`. Raises NoFolder."""
    where = os.path.abspath(root())
    try:
        # Ray would only say after half a minute that it has waited in vain.
        if (free := shutil.disk_usage(where).free) < _LEAST_FREE_BYTES:
            raise NoFolder(f"the disk of {where} has {free / 1e6:.1f} MB left, and {_LEAST_FREE_BYTES / 1e6:.0f} MB "
                           f"are needed. {advice()}")
        own = tempfile.mkdtemp(prefix="raylight-", dir=where)
    except OSError as error:
        raise error if isinstance(error, NoFolder) else NoFolder(f"{_words(error)}. {advice()}") from error
    path = os.path.join(own, _INSIDE)
    if fits(path):
        return RayFolder(path, (own,))
    os.mkdir(path)
    for short in _SHORT_ROOTS:
        try:
            holder = tempfile.mkdtemp(prefix="rl-", dir=short)
        except OSError:
            continue
        link = os.path.join(holder, _INSIDE)
        if fits(link):
            os.symlink(path, link)
            return RayFolder(link, (holder, own))
        shutil.rmtree(holder, ignore_errors=True)
    shutil.rmtree(own, ignore_errors=True)
    length = len(os.fsencode(where))
    longest = most_bytes() - (len(os.fsencode(path)) - length)
    letters = "" if where.isascii() else ", and letters that are not ASCII"
    raise NoFolder(f"its sockets cannot be there: {VARIABLE} = {where} has {length} bytes{letters}, and a short link "
                   f"to it can be made in none of {', '.join(_SHORT_ROOTS)}. Name a folder of at most {longest} bytes, "
                   f"of ASCII letters only")


def is_cause(error: BaseException, folder: RayFolder | None) -> bool:
    """Whether an error that Ray has met is one of its folder: a full disk, or no right to write there."""
    if not isinstance(error, OSError) or error.errno not in _OF_DISK or folder is None:
        return False
    named = [name for name in (error.filename, error.filename2) if isinstance(name, str)]
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or any(
        Path(name).is_relative_to(own) for name in named for own in folder.own)


def advice() -> str:
    """What to do where the folder is the cause."""
    return (f"Its temporary files go to {root()}, or where {VARIABLE} says: make room there, and let this user write "
            f"there")


def _words(error: OSError) -> str:
    return f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
