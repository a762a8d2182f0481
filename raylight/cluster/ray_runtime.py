"""Whether a Ray cluster can be at an address, asked before Ray is: it would wait for minutes, and then end ComfyUI."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
from collections.abc import Callable

import psutil
import ray
import torch
from ray._private import ray_constants

from . import orphan_guard, ray_environment
from .config import SessionConfig
from .timeouts import BackgroundCall, with_timeout

_PATIENCE_S = 5.0
# What opens a connection of HTTP/2, of which gRPC is made, and empty settings (RFC 9113, 3.4 and 6.5).
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_FRAME_HEADER, _KIND_AT, _SETTINGS = 9, 3, 4


def check_reachable(address: str) -> None:
    """Knock at "host:port"; does nothing for addresses of other forms.

    Raises OSError where nobody listens, or whoever does is not Ray.
    """
    host, separator, port = address.rpartition(":")
    if not (separator and port.isdigit() and "//" not in address):
        return
    with socket.create_connection((host, int(port)), timeout=_PATIENCE_S) as connection:
        connection.sendall(_GREETING)
        answer = b""
        try:
            while len(answer) < _FRAME_HEADER and (more := connection.recv(_FRAME_HEADER - len(answer))):
                answer += more
        except TimeoutError:
            pass
    if len(answer) < _FRAME_HEADER or answer[_KIND_AT] != _SETTINGS:
        raise ConnectionError("another program listens there, which is not Ray")


logger = logging.getLogger(__name__)

_LEFT_START_S = 60.0
_SHUTDOWN_S = 20.0
_NEEDED = ("gcs_server", "raylet")

_ours = False
_thread: BackgroundCall | None = None  # that has started Ray
_is_starting = False
_leaving: BackgroundCall | None = None  # a Ray that is broken takes seconds to be left
_guard: subprocess.Popen | None = None
_not_rays: frozenset[str] = frozenset()  # what ComfyUI and other packs had started before
_rays: frozenset[str] = frozenset()
_needed: dict[str, psutil.Process] = {}
_folder: ray_environment.RayFolder | None = None


def connect(config: SessionConfig, wants_cancel: Callable[[], bool]) -> None:
    """Have Ray up for this session; keeps what is already up in this process.

    Raises ConnectionError when the cluster at `config.address` does not answer, RuntimeError when Ray does not start
    here, and RunCancelled; a start that was cancelled goes on, and the next call finds it.
    """
    global _ours, _thread, _is_starting, _guard, _not_rays
    if _leaving is not None:
        _end_leaving()
    if not _is_starting and ray.is_initialized():
        return
    if not _is_starting:
        _ours = _is_starting = True
        _not_rays = orphan_guard.child_process_ids()
        ray_environment.prepare(config.is_local, torch.version.hip is not None)
        _bind_to_loopback(config.is_local)
        _thread = BackgroundCall(lambda: _start(config) if config.is_local else _join(config), stays=True)
    try:
        _thread.wait(config.start_timeout_s, "the start of Ray", wants_cancel)
    except ConnectionError:
        _forget()
        raise
    except Exception as error:
        words = _why_not(error)
        abandon()
        raise RuntimeError(f"Ray does not start on this machine: {words}") from error
    _is_starting = False
    if config.is_local:
        _note_processes()
        _guard = orphan_guard.guard(_not_rays, () if _folder is None else _folder.own)


def _start(config: SessionConfig) -> None:
    global _folder
    logger.info("starting Ray on this machine for %d workers", config.world_size)
    _folder = ray_environment.make()
    ray.init(
        address="local",
        include_dashboard=False,
        namespace=config.namespace,
        num_cpus=max(config.world_size, os.cpu_count() or 1),
        object_store_memory=config.object_store_bytes,
        log_to_driver=False,  # workers send their own, see worker_logs
        logging_level=logging.ERROR,  # its warnings at the start are about settings that are chosen here
        _temp_dir=_folder.path,
    )


def _join(config: SessionConfig) -> None:
    logger.info("joining the Ray cluster at %s", config.address)
    try:
        check_reachable(config.address)
        ray.init(address=config.address, namespace=config.namespace, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConnectionError(
            f"no Ray cluster answers at ray_cluster_address = {config.address}: {error}. "
            "Start one there with `ray start --head`, or use local. If the cluster asks for a token, start ComfyUI "
            "with RAY_AUTH_MODE=token and the cluster's token in RAY_AUTH_TOKEN."
        ) from error


def _why_not(error: BaseException) -> str:
    """Why Ray has not started: in its own words, and with what helps where that is known."""
    if isinstance(error, ray_environment.NoFolder):
        return f"{error}."
    words = str(error).strip().rstrip(".") or type(error).__name__
    if ray_environment.is_cause(error, _folder):
        return f"{words}. {ray_environment.advice()}."
    return f"{words}.{ray_environment.of_person()}"


def _note_processes() -> None:
    global _rays, _needed
    children = psutil.Process().children(recursive=True)
    _needed = {_name(child): child for child in children if _name(child).startswith(_NEEDED)}
    _rays = frozenset(orphan_guard.process_ids(children)) - _not_rays


def _bind_to_loopback(local: bool) -> None:
    """Have Ray's processes listen on the loopback interface only, or, for a cluster, on the machine's address.

    `ray.init` replaces a loopback address by the machine's own; this switch of Ray's is the one way around.
    The variable is for the processes that Ray starts, the constant for this one, which has read it already.
    """
    if not hasattr(ray_constants, "ENABLE_RAY_CLUSTER"):
        raise RuntimeError(f"Ray {ray.__version__} cannot be kept on the loopback interface: install another version")
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0" if local else "1"
    ray_constants.ENABLE_RAY_CLUSTER = not local


def lost() -> str | None:
    """Which of the processes that the local Ray cannot do without is gone; None while all are there.

    Ray ends this whole process a minute after that, so somebody has to ask, and to `abandon` it.
    """
    for name, process in _needed.items():
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                continue
        except psutil.NoSuchProcess:
            pass
        return f"{name} (pid {process.pid})"
    return None


def disconnect() -> None:
    """Leave Ray, and end it where it is a Ray of our own. Leaves alone what another pack has started."""
    if _is_starting:
        try:
            _thread.wait(_LEFT_START_S, "the start of Ray")
        except Exception as error:
            logger.debug("the start of Ray had failed: %s", error)
    if _ours and ray.is_initialized() and lost() is None:
        try:
            with_timeout(ray.shutdown, _SHUTDOWN_S, "the end of Ray")
        except TimeoutError as error:
            logger.warning("%s: its processes are ended", error)
            abandon()
    elif _ours:
        abandon()
    if _leaving is not None:
        _end_leaving()
    _forget()


def abandon() -> None:
    """End a Ray of our own that no longer answers: its processes first, as it would wait for them. What then is left
    to do in this process goes on beside others."""
    global _leaving
    running = psutil.Process().children(recursive=True)
    workers = [child for child in running if _name(child).startswith(("ray::", *_NEEDED))]
    for process in orphan_guard.find({*_rays, *orphan_guard.process_ids(workers)}):
        process.kill()
    if ray.is_initialized() and _leaving is None:
        _leaving = BackgroundCall(ray.shutdown)
    _forget()


def _end_leaving() -> None:
    global _leaving
    try:
        _leaving.wait(_SHUTDOWN_S, "the end of the Ray before")
    except Exception as error:
        logger.warning("Ray could not be ended in order: %s", error)
    _leaving = None
    ray_environment.restore()


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""


def _forget() -> None:
    global _ours, _thread, _is_starting, _guard, _rays, _needed, _folder
    _ours, _is_starting, _rays, _needed = False, False, frozenset(), {}
    if _thread is not None:
        _thread.release()
        _thread = None
    if _guard is not None:
        _guard.stdin.close()
        _guard.wait(timeout=30)
        _guard = None
    if _folder is not None:
        _folder.remove()
        _folder = None
    if _leaving is None:
        ray_environment.restore()  # Ray reads it anew, for which none may be up


def log_folder() -> str | None:
    """Where the processes of the local Ray write their logs."""
    return None if _folder is None else os.path.join(_folder.path, "session_latest", "logs")


def has_room(config: SessionConfig) -> bool:
    """Whether the local Ray that is up was started with enough processors for this session."""
    is_up = ray.is_initialized() and _leaving is None and lost() is None
    return is_up and ray.cluster_resources().get("CPU", 0) >= config.world_size


def loopback_interface() -> str | None:
    """The name of this machine's loopback interface, for sockets that must not leave it."""
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
