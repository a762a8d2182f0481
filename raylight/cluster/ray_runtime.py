"""Ray in this process: a local Ray that is started and ended here, or a cluster that is joined."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence

import psutil
import ray
import torch
from ray._private import ray_constants

from . import fork_server, orphan_guard, ray_environment
from .config import SessionConfig
from .fork_server import ForkServer
from .joining import join_cluster
from .patient_start import patient_start
from .timeouts import BackgroundCall, with_timeout

logger = logging.getLogger(__name__)

_START_TO_FINISH_S = 60.0
_SHUTDOWN_S = 20.0
_KILL_S = 5.0
_REQUIRED = ("gcs_server", "raylet")
_WORKER_PREFIX = "ray::"
# What takes half of the time of Ray's import, which itself would end forks.
_RAYS_LIBRARIES = tuple(
    """
    requests jsonschema google.protobuf.descriptor_pb2 google.protobuf.json_format google.protobuf.timestamp_pb2
    filelock packaging.version attr logging.handlers pdb
    """.split()
)


ForkedImports = tuple[Sequence[str], Sequence[str]]


class RayRuntime:
    """Ray in this process. Use the one instance `RUNTIME`; Ray itself is one per process."""

    def __init__(self) -> None:
        self._start_call: BackgroundCall | None = None  # None if Ray is not up, or was started by another pack
        self._is_starting = False
        self._shutdown_call: BackgroundCall | None = None  # a broken Ray takes seconds to shut down
        self._variables: dict[str, str | None] = {}  # of the environment, before the start
        self._inherited: dict[str, str] | None = None  # by the local Ray's workers
        self._config: SessionConfig | None = None  # that Ray was started or joined for
        self._fork_server: ForkServer | None = None
        self._folder: ray_environment.RayFolder | None = None
        self._guard: subprocess.Popen | None = None
        self._foreign_ids: frozenset[str] = frozenset()  # children that ComfyUI and other packs started before
        self._ray_ids: frozenset[str] = frozenset()
        self._required: dict[str, psutil.Process] = {}
        self._missing: list[str] = []  # of the required processes, when Ray had just started

    def connect(
        self,
        config: SessionConfig,
        environment: Mapping[str, str],
        wants_cancel: Callable[[], bool],
        forked_imports: ForkedImports = ((), ()),
    ) -> None:
        """Start or join Ray for a session; keep a Ray that is already up in this process.

        Workers of a local Ray that is started now inherit the variables of `environment`, and may be forked from a
        process that has imported `forked_imports`, of a service's `forked_imports` and `tried_imports`.

        Raises ConnectionError: when the cluster at `config.address` does not answer. Raises RuntimeError: when Ray
        does not start here. Raises RunCancelled: when cancelled; the start goes on, and the next call waits for it.
        """
        self._finish_shutdown()
        call = self._start_call if self._is_starting else None
        if call is None:
            if ray.is_initialized():
                return
            call = self._begin_start(config, dict(environment), forked_imports)
        try:
            call.wait(config.start_timeout_s, "the start of Ray", wants_cancel)
        except ConnectionError:
            self._reset()
            raise
        except Exception as error:
            reason = self._reason(error)
            self.abandon()
            raise RuntimeError(f"Ray does not start on this machine: {reason}") from error
        self._is_starting = False
        if config.is_local:
            self._guard_processes()

    def lost(self) -> str | None:
        """Return which of the local Ray's required processes has ended, None while all run.

        Ray ends this process a minute after that, unless `abandon` is called.
        """
        if self._missing:
            return self._missing[0]
        for name, process in self._required.items():
            if not orphan_guard.is_running(process):
                return f"{name} (pid {process.pid})"
        return None

    def disconnect(self) -> None:
        """Leave the cluster, or end the local Ray. Does nothing to a Ray that another pack has started."""
        if self._start_call is not None:
            if self._is_starting:
                try:
                    self._start_call.wait(_START_TO_FINISH_S, "the start of Ray")
                except Exception as error:
                    logger.debug("the start of Ray had failed: %s", error)
            if ray.is_initialized() and self.lost() is None:
                try:
                    with_timeout(ray.shutdown, _SHUTDOWN_S, "the end of Ray")
                except TimeoutError as error:
                    logger.warning("%s: its processes are killed", error)
                    self.abandon()
            else:
                self.abandon()
        self._finish_shutdown()
        self._reset()

    def abandon(self) -> None:
        """Kill the processes of a Ray that does not answer, and shut it down in the background.

        The processes come first: the shutdown would wait for them.
        """
        children = psutil.Process().children(recursive=True)
        rays = [child for child in children if orphan_guard.name_of(child).startswith((_WORKER_PREFIX, *_REQUIRED))]
        ours = {*orphan_guard.process_ids(rays)} - self._foreign_ids
        for process in orphan_guard.find(self._ray_ids | ours):
            process.kill()
        if ray.is_initialized() and self._shutdown_call is None:
            self._shutdown_call = BackgroundCall(ray.shutdown)
        self._reset()

    def serves(self, config: SessionConfig) -> bool:
        """Return whether a new session can have the Ray that runs or starts here, if any; earlier ones have ended.

        A cluster is joined again by each session. To a Ray of another pack there is no choice.
        """
        own = self._config
        if own is None:
            return True
        if (own.address, own.namespace, own.object_store_bytes) != (
            config.address,
            config.namespace,
            config.object_store_bytes,
        ):
            return False
        has_room = not own.is_local or config.world_size <= _cpus(own)
        is_up = own.is_local and ray.is_initialized() and self._shutdown_call is None and self.lost() is None
        return has_room and (self._is_starting or is_up)

    def provides(self, environment: Mapping[str, str]) -> bool:
        """Return whether workers start with these variables by themselves."""
        return self._inherited == environment

    @property
    def log_folder(self) -> str | None:
        """The folder with the logs of the local Ray's processes."""
        return None if self._folder is None else os.path.join(self._folder.path, "session_latest", "logs")

    def _begin_start(
        self, config: SessionConfig, environment: dict[str, str], forked_imports: ForkedImports
    ) -> BackgroundCall:
        self._config = config
        self._foreign_ids = orphan_guard.child_process_ids()
        _bind_to_loopback(config.is_local)
        saved = ray_environment.prepare(config.is_local, torch.version.hip is not None)
        self._variables = saved | self._variables  # what was there first counts
        if config.is_local:
            self._inherited = environment
            start = BackgroundCall(lambda: self._start_local(config, environment, forked_imports), stays=True)
        else:
            start = BackgroundCall(lambda: join_cluster(config), stays=True)
        self._start_call, self._is_starting = start, True
        return self._start_call

    def _start_local(self, config: SessionConfig, environment: dict[str, str], forked_imports: ForkedImports) -> None:
        logger.info("starting Ray on this machine for %d workers", config.world_size)
        self._folder = ray_environment.make_folder()
        self._start_fork_server(config, forked_imports, environment)
        with (
            ray_environment.inherited(environment),
            ray_environment.without_helpers(),
            patient_start(config.start_timeout_s),
        ):
            ray.init(
                address="local",
                include_dashboard=False,
                namespace=config.namespace,
                num_cpus=_cpus(config),
                object_store_memory=config.object_store_bytes,
                log_to_driver=False,  # workers report their logs themselves, see status.py
                logging_level=logging.ERROR,  # its warnings at the start are about settings that are chosen here
                _temp_dir=self._folder.path,
            )

    def _start_fork_server(self, config: SessionConfig, modules: ForkedImports, environment: Mapping[str, str]) -> None:
        """Start the process that workers are forked from, beside Ray, if this system can have it.

        It has the workers' environment: PyTorch chooses its allocator when it is loaded.
        """
        if not any(modules) or not fork_server.is_supported():
            return
        assert self._folder is not None
        try:
            imported, tried = modules
            self._fork_server = ForkServer(
                os.path.join(self._folder.owned[0], "forks"),
                (*imported, *_RAYS_LIBRARIES),
                tried,
                environment,
                config.device_type == "cuda",
            )
        except OSError as error:
            logger.info("workers start without a process to fork them from: %s", error)

    def end_fork_server(self) -> None:
        """End the process that workers are forked from, if there is one. Workers stay."""
        if self._fork_server is not None:
            self._fork_server.close()
            self._fork_server = None

    @property
    def worker_command(self) -> str | None:
        """The command by which Ray is to start workers here, None for its own."""
        if self._fork_server is None:
            return None
        if why := self._fork_server.why_ended():
            logger.info("workers are started one by one, and not forked: %s", why)
            return None
        return self._fork_server.command

    def forks(self, pids: Iterable[int]) -> tuple[int, dict[str, float]]:
        """Return how many of some workers here were forked, and the seconds of the imports made for them, by module."""
        if self._fork_server is None:
            return 0, {}
        server, count = self._fork_server.pid, 0
        for pid in pids:
            with contextlib.suppress(psutil.Error):
                count += psutil.Process(pid).ppid() == server
        for module, why in self._fork_server.left_out().items():
            logger.info("forked workers import %s themselves, as its import %s", module, why)
        return count, self._fork_server.import_seconds()

    def _reason(self, error: BaseException) -> str:
        """Return why Ray has not started, with a remedy where one is known."""
        if isinstance(error, ray_environment.FolderError):
            return f"{error}."
        text = str(error).strip().rstrip(".") or type(error).__name__
        if ray_environment.is_folder_error(error, self._folder):
            return f"{text}. {ray_environment.folder_remedy()}."
        return f"{text}.{ray_environment.user_variables()}"

    def _guard_processes(self) -> None:
        children = psutil.Process().children(recursive=True)
        self._required = orphan_guard.children_named(_REQUIRED, self._foreign_ids)
        self._missing = [name for name in _REQUIRED if not any(found.startswith(name) for found in self._required)]
        self._ray_ids = frozenset(orphan_guard.process_ids(children)) - self._foreign_ids
        self._guard = orphan_guard.start(self._foreign_ids, () if self._folder is None else self._folder.owned)

    def _finish_shutdown(self) -> None:
        if self._shutdown_call is None:
            return
        try:
            self._shutdown_call.wait(_SHUTDOWN_S, "the end of the previous Ray")
        except Exception as error:
            logger.warning("Ray did not shut down cleanly: %s", error)
        self._shutdown_call = None
        self._restore_variables()

    def _reset(self) -> None:
        """Forget the Ray that has ended, and release what was kept for it."""
        self._is_starting, self._ray_ids, self._required, self._missing = False, frozenset(), {}, []
        self._inherited = self._config = None
        if self._start_call is not None:
            self._start_call.release()
            self._start_call = None
        if self._guard is not None:
            self._guard.communicate(timeout=30)  # closes its standard input, so it exits
            self._guard = None
        self.end_fork_server()
        if self._folder is not None:
            self._folder.remove()
            self._folder = None
        if self._shutdown_call is None:  # Ray must be down when it reads its variables again
            self._restore_variables()

    def _restore_variables(self) -> None:
        ray_environment.restore(self._variables)
        self._variables = {}


RUNTIME = RayRuntime()


def _cpus(config: SessionConfig) -> int:
    """Return the number of CPUs that a local Ray is started with for a session."""
    return max(config.world_size, os.cpu_count() or 1)


def _bind_to_loopback(is_local: bool) -> None:
    """Make Ray's processes listen on the loopback interface only; for a cluster, on the machine's address.

    `ray.init` replaces a loopback address by the machine's own, unless this switch is set: as a variable for the
    processes that Ray starts, as a constant for this one, which has read the variable already.
    """
    if not hasattr(ray_constants, "ENABLE_RAY_CLUSTER"):
        raise RuntimeError(f"Ray {ray.__version__} cannot be kept on the loopback interface: install another version")
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0" if is_local else "1"
    ray_constants.ENABLE_RAY_CLUSTER = not is_local


def loopback_interface() -> str | None:
    """Return the name of this machine's loopback interface."""
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)


def kill_workers(pids: Iterable[int]) -> None:
    """Kill the processes of workers on this machine, also stopped ones, and wait until their memory is free."""
    processes = []
    for pid in pids:
        try:
            process = psutil.Process(pid)
            if process.name().startswith(_WORKER_PREFIX):  # the pid may have been reused
                process.kill()
                processes.append(process)
        except psutil.Error:
            continue
    psutil.wait_procs(processes, timeout=_KILL_S)
