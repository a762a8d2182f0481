"""The environment that Ray starts in: visible GPUs, the folder of its files, and its environment variables."""

from __future__ import annotations

import errno
import functools
import inspect
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

# ROCm's PyTorch reads HIP_VISIBLE_DEVICES, or CUDA_VISIBLE_DEVICES if that is not set. ROCR_VISIBLE_DEVICES is applied
# before both: their numbers count the GPUs that it leaves.
CUDA, HIP, ROCR = "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"
# Variables that keep Ray from changing them.
_NOSET = {name: f"RAY_EXPERIMENTAL_NOSET_{name}" for name in (CUDA, HIP)}


def visible_gpus(environ: Mapping[str, str], is_rocm: bool) -> list[str] | None:
    """Return the names (indices, UUIDs or MIG names) of the GPUs that a process sees, None if it sees all."""
    value = (environ.get(HIP) if is_rocm else None) or environ.get(CUDA)
    return [name.strip() for name in value.split(",")] if value else None


def machine_gpu_index(environ: Mapping[str, str], is_rocm: bool) -> int | None:
    """Return the machine's index of the first GPU that a process sees, None if the GPU is named by no index."""
    name = (visible_gpus(environ, is_rocm) or ["0"])[0]
    if is_rocm and name.isdigit() and environ.get(ROCR):
        left = environ[ROCR].split(",")
        name = left[int(name)].strip() if int(name) < len(left) else ""
    return int(name) if name.isdigit() else None


def select_gpu(index: int, environ: Mapping[str, str], is_rocm: bool) -> dict[str, str]:
    """Return variables that show a process only one GPU, the `index`th that this one sees, whatever Ray assigns."""
    visible = visible_gpus(environ, is_rocm)
    name = str(index) if visible is None else visible[index]
    variables = (CUDA, HIP) if is_rocm else (CUDA,)
    return dict.fromkeys(variables, name) | {_NOSET[variable]: "1" for variable in variables}


def hip_variables(environ: Mapping[str, str], is_rocm: bool) -> dict[str, str]:
    """Return variables without which Ray refuses to start on ROCm.

    If ROCR_VISIBLE_DEVICES is set, Ray requires HIP_VISIBLE_DEVICES too. The value changes nothing.
    """
    if not is_rocm or HIP in environ or ROCR not in environ:
        return {}
    left = [name for name in environ[ROCR].split(",") if name.strip()]
    return {HIP: environ.get(CUDA) or ",".join(str(index) for index in range(len(left)))}


FOLDER_VARIABLE = "RAY_TMPDIR"
_MIN_FREE_BYTES = 100_000_000
_INSIDE = "r"  # Ray opens its folder to all users, so put it inside of a private one
_SOCKET_BYTES = 103 if sys.platform == "darwin" else 107
_SOCKET_PATH = "/session_2026-01-01_00-00-00_000000_{pid}/sockets/plasma_store"
_SHORT_ROOTS = ("/tmp", "/var/tmp", "/dev/shm")
_FOLDER_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR)


class FolderError(OSError):
    """Ray's files cannot be placed. The message names the reason and the remedy."""


@dataclass(frozen=True, slots=True)
class RayFolder:
    """The folder `path` that Ray is given, and the folders `owned` that `remove` deletes."""

    path: str
    owned: tuple[str, ...]

    def remove(self) -> None:
        """Delete the owned folders."""
        for folder in self.owned:
            shutil.rmtree(folder, ignore_errors=True)


def folder_root() -> str:
    """Return the folder for Ray's files. On POSIX this ignores TMPDIR, whose paths are long on many machines."""
    return os.environ.get(FOLDER_VARIABLE) or ("/tmp" if os.name == "posix" else tempfile.gettempdir())


def max_folder_bytes() -> int:
    """Return the maximum length of the path that Ray is given."""
    return _SOCKET_BYTES - len(_SOCKET_PATH.format(pid=os.getpid()))


def fits_sockets(path: str) -> bool:
    """Return whether Ray can create its sockets in a folder of this path."""
    return os.name != "posix" or (path.isascii() and len(os.fsencode(path)) <= max_folder_bytes())


def make_folder() -> RayFolder:
    """Make a new folder for Ray's files in `folder_root`. Raises FolderError."""
    root = os.path.abspath(folder_root())
    try:
        # Ray itself would report a full disk only after half a minute, as a timeout.
        if (free := shutil.disk_usage(root).free) < _MIN_FREE_BYTES:
            raise FolderError(
                f"the disk of {root} has {free / 1e6:.1f} MB left, and {_MIN_FREE_BYTES / 1e6:.0f} MB are needed. "
                f"{folder_remedy()}"
            )
        private = tempfile.mkdtemp(prefix="raylight-", dir=root)
    except FolderError:
        raise
    except OSError as error:
        raise FolderError(
            f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}. {folder_remedy()}"
        ) from error
    path = os.path.join(private, _INSIDE)
    if fits_sockets(path):
        return RayFolder(path, (private,))
    os.mkdir(path)
    for short in _SHORT_ROOTS:
        try:
            holder = tempfile.mkdtemp(prefix="rl-", dir=short)
        except OSError:
            continue
        link = os.path.join(holder, _INSIDE)
        if fits_sockets(link):
            os.symlink(path, link)
            return RayFolder(link, (holder, private))
        shutil.rmtree(holder, ignore_errors=True)
    shutil.rmtree(private, ignore_errors=True)
    length = len(os.fsencode(root))
    longest = max_folder_bytes() - (len(os.fsencode(path)) - length)
    letters = "" if root.isascii() else " and letters that are not ASCII"
    raise FolderError(
        f"{FOLDER_VARIABLE} = {root} has {length} bytes{letters}, which is too long for Ray's sockets, and no short "
        f"link to it can be made in {', '.join(_SHORT_ROOTS)}. Choose a folder of at most {longest} bytes, of ASCII "
        f"letters only"
    )


def is_folder_error(error: BaseException, folder: RayFolder | None) -> bool:
    """Return whether an error of Ray's start is due to its folder: a full disk, or no permission to write there."""
    if not isinstance(error, OSError) or error.errno not in _FOLDER_ERRNOS or folder is None:
        return False
    paths = [path for path in (error.filename, error.filename2) if isinstance(path, str)]
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or any(
        Path(path).is_relative_to(owned) for path in paths for owned in folder.owned
    )


def folder_remedy() -> str:
    """Return what to do if Ray's folder is the root cause."""
    return (
        f"Ray's temporary files go to {folder_root()}; set {FOLDER_VARIABLE} to change that. Free space there, and "
        f"make sure that this user can write there"
    )


# Of a machine of a cluster: where its workers find ComfyUI and Raylight, and files such as ComfyUI's
# extra_model_paths.yaml, both by os.pathsep.
PATH_VARIABLE, MODEL_PATHS_VARIABLE = "RAYLIGHT_PATH", "RAYLIGHT_MODEL_PATHS"
TOKEN, TOKEN_PATH, AUTH_MODE = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"
_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # by default workers run at a lower priority than other programs
}
# Locations, secrets, and what Ray and this module set themselves.
_NOT_REPORTED = {
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
# By default Ray starts a process for each CPU at once, and ours, of which no two are alike, are none of them.
_LOCAL = {"RAY_prestart_worker_first_driver": "0", "RAY_preload_python_modules": "raylight.cluster.preload"}
_MAX_CHARACTERS = 120  # of a variable's value in a message


def prepare(is_local: bool, is_rocm: bool) -> dict[str, str | None]:
    """Set the variables with which Ray is started or joined.

    Return the values that the variables for this one start had before, for `restore`.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    if not is_local:
        return _use_token()
    values = hip_variables(os.environ, is_rocm)
    before: dict[str, str | None] = dict.fromkeys(values)
    if (
        os.environ.get(AUTH_MODE, "token").lower() == "token"
        and not (os.environ.get(TOKEN) or os.environ.get(TOKEN_PATH))
        and (token := _new_token()) is not None
    ):
        # Without it, Ray writes a token into the user's home, where it stays; and it may not be able to.
        values[TOKEN] = token
        before |= {name: os.environ.get(name) for name in (TOKEN, AUTH_MODE)}  # Ray sets AUTH_MODE
    os.environ.update(values)
    if TOKEN in values:
        _reload_token()
    return before


def restore(before: Mapping[str, str | None]) -> None:
    """Undo `prepare`: the next Ray may be another one, with another token or none."""
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if TOKEN in before or AUTH_MODE in before:
        _reload_token()


def default_token() -> Path:
    """Return the file in which Ray looks for a cluster's token."""
    return Path.home() / ".ray" / "auth_token"


def _use_token() -> dict[str, str | None]:
    """Have this process show a cluster its token, if it has one and the user has not said otherwise."""
    has_token = os.environ.get(TOKEN) or os.environ.get(TOKEN_PATH) or default_token().is_file()
    if AUTH_MODE in os.environ or not has_token or _new_token() is None:
        return {}
    os.environ[AUTH_MODE] = "token"
    _reload_token()
    return {AUTH_MODE: None}


@contextmanager
def inherited(variables: Mapping[str, str]) -> Iterator[None]:
    """Have a local Ray that is started within this context, and its workers, inherit `variables`.

    They are in this process's environment meanwhile. A worker then starts at once: for variables of its own, Ray would
    first have to start an agent that prepares environments.
    """
    values = _LOCAL | dict(variables)
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        restore(before)


@contextmanager
def without_helpers() -> Iterator[None]:
    """Have a Ray that is started within this context start none of the processes that have nothing to do here.

    They are the dashboard, the autoscaler, and what sends the lines of workers' logs to the driver. Each takes system
    memory and a second of a CPU. Ray has parameters for the last two, which `ray.init` does not have. The dashboard is
    started even where it is not wanted, and Ray waits for it before it goes on; its function then returns what this
    one does.
    """
    from ray._private import parameter, services

    api_server, node_parameters = getattr(services, "start_api_server", None), parameter.RayParams
    unwanted = {"no_monitor": True, "include_log_monitor": False}
    known = unwanted.keys() & inspect.signature(node_parameters).parameters
    if api_server is None or len(known) < len(unwanted):
        logger.debug("this version of Ray may start processes that have nothing to do")
    if api_server is not None:
        services.start_api_server = lambda *_, **__: (None, None)
    parameter.RayParams = functools.partial(node_parameters, **{name: unwanted[name] for name in known})
    try:
        yield
    finally:
        parameter.RayParams = node_parameters
        if api_server is not None:
            services.start_api_server = api_server


def user_variables(environ: Mapping[str, str] = os.environ) -> str:
    """Return a sentence that names the Ray variables that the user has set, a possible root cause; else ""."""
    found = ", ".join(
        f"{name}={value if len(value) <= _MAX_CHARACTERS else value[:_MAX_CHARACTERS] + '...'}"
        for name, value in sorted(environ.items())
        if name.startswith("RAY_") and name not in _NOT_REPORTED and value
    )
    return f" ComfyUI was started with {found}, which changes Ray: try without." if found else ""


def _new_token() -> str | None:
    """Return a token in Ray's format, None for a Ray without tokens."""
    try:
        from ray._private.authentication.authentication_token_generator import generate_new_authentication_token
    except ImportError:
        return None
    return generate_new_authentication_token()


def _reload_token() -> None:
    """Make Ray in this process read the mode and the token again. It caches both."""
    from ray._raylet import AuthenticationTokenLoader, Config  # pyright: ignore[reportAttributeAccessIssue]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
