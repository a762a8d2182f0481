"""A process that imports what every worker imports, and forks workers, which then start without imports.

Imports are most of a worker's start: PyTorch, its compiler and other libraries are some thousands of files. They are
imported once, while Ray starts. Workers share that memory too, until they write to it.

Ray starts a worker by the command `command` (`py_executable` of a runtime environment), which runs `fork_client.py`.
That asks this process for a fork, which takes on the command line, environment, folder and files of the client. If this
process is gone, the client becomes the worker itself, as without it.

This process imports no module that starts CUDA or threads: neither would work in a fork. Nor Ray, which ends a fork of
a process that has imported it. It ends when its standard input is closed, or by itself if a module has done that; then
it writes which. Modules that may do it are tried in a fork first, beside the other imports, and left to workers if they
do.

Libraries that ask whether there is a GPU are told by who started this process: to find out would start CUDA where NVML
is missing.

Its standard output is a report, in lines of JSON: the seconds of each import, what was left out, an obstacle.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_BACKLOG = 128
_REQUEST_BYTES = 1 << 20
_STANDARD_FILES = 3
# What the drivers of NVIDIA, AMD and Intel have open from their start on. Others of NVIDIA's files NVML opens too.
_GPU_FILES = ("/dev/nvidia-uvm", "/dev/kfd", "/dev/dri")
_CUDA, _CUDA_NOT_INITIALIZED = "libcuda.so.1", 3
_NVML, _MOST_SHUTDOWNS = "libnvidia-ml.so.1", 1000
_REPORT_BYTES = 1 << 16
_END_S, _TRIAL_S = 5.0, 20.0
_PR_SET_PDEATHSIG = 1
_BEFORE_TRIALS = 2  # PyTorch and its compiler: each trial would import them itself
# Libraries of linear algebra start threads when they are loaded.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
# Without it the question whether there is a GPU would start CUDA.
_NO_CUDA = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


class ForkServer:
    """The process, as seen from the one that starts it."""

    def __init__(
        self,
        path: str,
        modules: Sequence[str],
        tried: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
        has_gpu: bool = False,
    ) -> None:
        """Start it, to listen at the socket `path` from now on and to fork when it has imported `modules`, and those of
        `tried` that do not start CUDA or threads.

        `variables` are added to its environment, for libraries that read theirs when they are loaded. With `has_gpu`
        libraries are told that PyTorch can use a GPU.

        Raises OSError: when there can be no such socket, or no process.
        """
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(_BACKLOG)
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(listener.fileno()), json.dumps([modules, tried, has_gpu])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **(variables or {}), **_ONE_THREAD, **_NO_CUDA},
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )
        self._reported, self._why = b"", ""
        client = Path(__file__).with_name("fork_client.py")
        # Without `site` and the environment, whose packages can take long to start.
        self.command = shlex.join([sys.executable, "-S", "-E", str(client), path])

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def import_seconds(self) -> dict[str, float]:
        """Return how long the imports took that it has made until now, by module."""
        return {line["module"]: line["seconds"] for line in self._report() if "module" in line}

    def left_out(self) -> dict[str, str]:
        """Return what it has left to workers until now, and why, by module."""
        return {line["left out"]: line["why"] for line in self._report() if "left out" in line}

    def why_ended(self) -> str | None:
        """Return why the process has ended by itself, None if it runs."""
        if self._process.poll() is None:
            return None
        if not self._why:
            self._why = next((line["obstacle"] for line in self._report() if line.get("obstacle")), "")
            self._why = self._why or f"its process has ended (exit status {self._process.returncode})"
        return self._why

    def _report(self) -> list[dict[str, Any]]:
        """Return the complete lines of its report until now."""
        output = self._process.stdout
        assert output is not None
        while not output.closed and select.select([output], [], [], 0)[0]:
            more = os.read(output.fileno(), _REPORT_BYTES)
            if not more:
                break
            self._reported += more
        return [json.loads(line) for line in self._reported.split(b"\n")[:-1]]

    def close(self) -> None:
        """End the process. Workers that it has forked go on."""
        if self.why_ended() is not None:
            return
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:  # within an import
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._why = "it was ended"


def is_supported() -> bool:
    """Return whether workers can be forked on this system, and started by another command in this version of Ray."""
    if sys.platform != "linux":
        return False
    try:
        from ray._private.runtime_env.py_executable import PyExecutablePlugin  # noqa: F401
    except ImportError:
        return False
    return True


def _serve(listener: socket.socket) -> None:
    """Fork for each client, until standard input is closed; in a fork, until its worker ends.

    What ends a worker is raised in its own process, as without a fork.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # Ray looks after workers; the system may forget them
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            os._exit(0)  # at once: to take apart what was imported takes a second
        client, _ = listener.accept()
        request = None
        with client, contextlib.suppress(OSError, ValueError):
            request = _answer(client)
        if request is not None:
            listener.close()
            _become(request)
            return


def _answer(client: socket.socket) -> dict[str, Any] | None:
    """Fork for a client. Return its request in the fork, which has its standard files; None in this process."""
    request, files = _receive(client)
    try:
        if _has_gone(client):
            return None
        if os.fork() == 0:
            for number, file in enumerate(files):
                os.dup2(file, number)
            return request
        client.sendall(b"forked")
        return None
    finally:
        for file in files:
            os.close(file)


def _receive(client: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Return a client's command line, environment and folder, and its standard files."""
    data, files, _, _ = socket.recv_fds(client, _REQUEST_BYTES, _STANDARD_FILES)
    while not data.endswith(b"\n"):
        more = client.recv(_REQUEST_BYTES)
        if not more:
            raise ValueError("the client has gone")
        data += more
    return json.loads(data), files


def _has_gone(client: socket.socket) -> bool:
    """Return whether a client has waited for too long, and become a worker itself."""
    client.setblocking(False)
    try:
        return client.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    finally:
        client.setblocking(True)


def _become(request: dict[str, Any]) -> None:
    """Be the worker that a client was to be."""
    os.setsid()  # Ray ends a worker with its group of processes
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    script = request["arguments"][0]
    first = [os.path.dirname(script), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    sys.path[:] = [*first, *(path for path in sys.path if path not in first)]
    sys.argv[:] = request["arguments"]
    gc.enable()
    runpy.run_path(script, run_name="__main__")


def _import_all(modules: Sequence[str], tried: Sequence[str], has_gpu: bool, report: int) -> bool:
    """Import what is there of some modules; a worker imports the others itself. Return whether none of them has done
    what a fork cannot have. `report` is the file that the report goes to.

    The first of `modules` are there when those of `tried` are tried.
    """
    gc.disable()  # it takes two fifths of the time of imports
    trials: dict[str, _Trial] = {}
    for index, module in enumerate([*modules, *tried]):
        if index == min(_BEFORE_TRIALS, len(modules)):
            trials = {one: _Trial(one, has_gpu) for one in tried}
        began = time.monotonic()
        if module in trials and (why := trials[module].found()):
            _write(report, **{"left out": module, "why": why})
            continue
        with _told_of_gpu(has_gpu):
            _import(module)
        _write(report, module=module, seconds=round(time.monotonic() - began, 3))
        if obstacle := _obstacle():
            _write(report, obstacle=f"the import of {module} {obstacle}")
            return False
    _end_nvml()
    gc.freeze()  # a collection would write to the memory that workers share
    return True


def _import(module: str) -> None:
    with contextlib.suppress(Exception):
        importlib.import_module(module)


class _Trial:
    """The import of a module in a fork, which ends then."""

    def __init__(self, module: str, has_gpu: bool) -> None:
        """Begin it, beside this process."""
        self._began = time.monotonic()
        reads, writes = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # it ends with this process
            with _told_of_gpu(has_gpu):
                _import(module)
            os.write(writes, _obstacle().encode())
            os._exit(0)
        os.close(writes)
        self._answer = open(reads, "rb")  # closed by `found`

    def found(self) -> str:
        """Wait for it. Return what this import would keep a fork from, "" if nothing."""
        with self._answer as answer:
            left_s = max(0.0, self._began + _TRIAL_S - time.monotonic())
            in_time = bool(select.select([answer], [], [], left_s)[0])
            if not in_time:
                os.kill(self._pid, signal.SIGKILL)
            why = answer.read().decode()
        _, status = os.waitpid(self._pid, 0)
        if not in_time:
            return f"has not ended within {_TRIAL_S:g} s"
        return why or (f"has ended a process (status {status})" if status else "")


@contextlib.contextmanager
def _told_of_gpu(has_gpu: bool) -> Iterator[None]:
    """Within it PyTorch answers that there is a GPU, if it is imported already."""
    cuda: Any = sys.modules.get("torch.cuda") if has_gpu else None
    if cuda is None:
        yield
        return
    before, cuda.is_available = cuda.is_available, lambda: True
    try:
        yield
    finally:
        cuda.is_available = before


def _write(report: int, **line: Any) -> None:
    os.write(report, json.dumps(line).encode() + b"\n")


def _obstacle() -> str:
    """Return what keeps a fork of this process from using CUDA and threads."""
    cuda = _loaded(_CUDA)
    if cuda is not None and cuda.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != _CUDA_NOT_INITIALIZED:
        return "has started CUDA"
    threads = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    if len(threads) > 1:
        return f"has started threads ({', '.join(sorted(threads))})"
    files = []
    for file in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself
            files.append(os.readlink(f"/proc/self/fd/{file}"))
    opened = next((name for name in files if name.startswith(_GPU_FILES)), "")
    return f"has opened {opened}" if opened else ""


def _end_nvml() -> None:
    """End what questions for GPUs have begun in NVML: each fork begins it anew, with files of its own.

    PyTorch begins it once for each question.
    """
    nvml = _loaded(_NVML)
    if nvml is not None:
        any(nvml.nvmlShutdown() != 0 for _ in range(_MOST_SHUTDOWNS))


def _loaded(name: str) -> ctypes.CDLL | None:
    """Return a library if this process has loaded it."""
    try:
        return ctypes.CDLL(name, mode=os.RTLD_NOLOAD)
    except OSError:
        return None


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose modules have names of others
    report = os.dup(1)
    os.dup2(2, 1)  # what modules print is not for the one who reads the report
    modules, tried, has_gpu = json.loads(sys.argv[2])
    can_fork = _import_all(modules, tried, has_gpu, report)
    os.close(report)  # not for forks
    if can_fork:
        _serve(socket.socket(fileno=int(sys.argv[1])))
