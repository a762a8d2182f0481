"""Which GPUs a process sees, by the environment variables of CUDA and of ROCm.

ROCm's PyTorch takes HIP_VISIBLE_DEVICES, or CUDA_VISIBLE_DEVICES where that is not set. ROCR_VISIBLE_DEVICES comes
before both: their numbers count what it leaves.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CUDA, HIP, ROCR = "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"
# Ray's switches for leaving them as they are.
_NOSET = {name: f"RAY_EXPERIMENTAL_NOSET_{name}" for name in (CUDA, HIP)}


def names(environ: Mapping[str, str], is_rocm: bool) -> list[str] | None:
    """What the GPUs that a process sees are called, in its order: indices, UUIDs or MIG names. None where its
    environment leaves all of them."""
    value = (environ.get(HIP) if is_rocm else None) or environ.get(CUDA)
    return [name.strip() for name in value.split(",")] if value else None


def of_machine(environ: Mapping[str, str], is_rocm: bool) -> int | None:
    """The machine's index of the first GPU that a process sees; None where it is called otherwise."""
    name = (names(environ, is_rocm) or ["0"])[0]
    if is_rocm and name.isdigit() and environ.get(ROCR):
        left = environ[ROCR].split(",")
        name = left[int(name)].strip() if int(name) < len(left) else ""
    return int(name) if name.isdigit() else None


def only(index: int, environ: Mapping[str, str], is_rocm: bool) -> dict[str, str]:
    """Variables by which a process sees one GPU, the `index`th that this one sees, whatever Ray would choose."""
    seen = names(environ, is_rocm)
    name = str(index) if seen is None else seen[index]
    return {
        variable: value
        for of_kind in ((CUDA, HIP) if is_rocm else (CUDA,))
        for variable, value in ((of_kind, name), (_NOSET[of_kind], "1"))
    }


def for_ray(environ: Mapping[str, str], is_rocm: bool) -> dict[str, str]:
    """Variables without which Ray refuses to start on ROCm: with ROCR_VISIBLE_DEVICES it wants HIP_VISIBLE_DEVICES, and
    gets what that is anyway."""
    if not is_rocm or HIP in environ or ROCR not in environ:
        return {}
    left = [name for name in environ[ROCR].split(",") if name.strip()]
    return {HIP: environ.get(CUDA) or ",".join(str(index) for index in range(len(left)))}


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
            raise NoFolder(
                f"the disk of {where} has {free / 1e6:.1f} MB left, and {_LEAST_FREE_BYTES / 1e6:.0f} MB "
                f"are needed. {advice()}"
            )
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
    raise NoFolder(
        f"its sockets cannot be there: {VARIABLE} = {where} has {length} bytes{letters}, and a short link "
        f"to it can be made in none of {', '.join(_SHORT_ROOTS)}. Name a folder of at most {longest} bytes, "
        f"of ASCII letters only"
    )


def is_cause(error: BaseException, folder: RayFolder | None) -> bool:
    """Whether an error that Ray has met is one of its folder: a full disk, or no right to write there."""
    if not isinstance(error, OSError) or error.errno not in _OF_DISK or folder is None:
        return False
    named = [name for name in (error.filename, error.filename2) if isinstance(name, str)]
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or any(
        Path(name).is_relative_to(own) for name in named for own in folder.own
    )


def advice() -> str:
    """What to do where the folder is the cause."""
    return (
        f"Its temporary files go to {root()}, or where {VARIABLE} says: make room there, and let this user write there"
    )


def _words(error: OSError) -> str:
    return f"{error.strerror or error}: {error.filename}" if error.filename else str(error)


TOKEN, TOKEN_PATH, AUTH_MODE = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"
_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # by default workers give way to every other program of the machine
}
# Where Ray's files and clusters are, and what is a secret; and what Ray and this module set themselves.
_UNTOLD = frozenset(
    {
        "RAY_TMPDIR",
        "RAY_ADDRESS",
        "RAY_NAMESPACE",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",
        "RAY_CLIENT_MODE",
        AUTH_MODE,
        TOKEN,
        TOKEN_PATH,
        *_DEFAULTS,
    }
)
_LONGEST = 120  # characters of a value that are repeated in a message

_before: dict[str, str | None] = {}


def prepare(is_local: bool, is_rocm: bool) -> None:
    """Set what Ray is to be started, or joined, with; `restore` takes back what is for one start."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    if not is_local:
        return
    values = for_ray(os.environ, is_rocm)
    if (
        os.environ.get(AUTH_MODE, "token").lower() == "token"
        and not (os.environ.get(TOKEN) or os.environ.get(TOKEN_PATH))
        and (token := _new_token()) is not None
    ):
        # Ray would write one into the home of the person, for good; and it may not be able to.
        values[TOKEN] = token
        _before.setdefault(AUTH_MODE, os.environ.get(AUTH_MODE))  # Ray sets it
    for name, value in values.items():
        _before.setdefault(name, os.environ.get(name))
        os.environ[name] = value
    if TOKEN in values:
        _read_again()


def restore() -> None:
    """Take back what `prepare` has set for one start: another Ray may be joined next, with another token or none."""
    had_token = TOKEN in _before
    for name, value in _before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _before.clear()
    if had_token:
        _read_again()


def of_person(environ: Mapping[str, str] = os.environ) -> str:
    """A sentence that names what is set for Ray in ComfyUI's environment, which may be why Ray does otherwise than it
    should; empty where nothing is."""
    found = {
        name: value
        for name, value in sorted(environ.items())
        if name.startswith("RAY_") and name not in _UNTOLD and value
    }
    if not found:
        return ""
    named = ", ".join(
        f"{name}={value if len(value) <= _LONGEST else value[:_LONGEST] + '...'}" for name, value in found.items()
    )
    return f" ComfyUI was started with {named}, which changes Ray: try without."


def _new_token() -> str | None:
    """A token as Ray makes them; None for a Ray that knows no tokens."""
    try:
        from ray._private.authentication.authentication_token_generator import generate_new_authentication_token
    except ImportError:
        return None
    return generate_new_authentication_token()


def _read_again() -> None:
    """Have Ray, in this process, read the mode and the token anew: it keeps both."""
    from ray._raylet import AuthenticationTokenLoader, Config

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
