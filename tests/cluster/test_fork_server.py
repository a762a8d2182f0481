"""Processes forked from one that has made their imports, by themselves and as workers of Ray."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from echo_service import EchoService

from raylight.cluster import active_session, fork_server
from raylight.cluster.config import ServiceSpec, SessionConfig
from raylight.cluster.fork_server import ForkServer
from raylight.cluster.ray_runtime import RUNTIME
from raylight.parallel.mesh import MeshShape

ROOT = Path(__file__).resolve().parents[2]
SERVICE = ServiceSpec(
    "echo_service:open_service",
    "settings",
    (str(ROOT), str(ROOT / "tests" / "support")),
    forked_imports=("torch", "no_such_module"),
)
WAIT_S = 60

pytestmark = pytest.mark.skipif(not fork_server.is_supported(), reason="needs Linux and Ray with py_executable")

SCRIPT = """
import json, os, sys
print(json.dumps({
    "parent": os.getppid(), "arguments": sys.argv[1:], "folder": os.getcwd(), "variable": os.environ.get("A_VARIABLE"),
    "others": "ANOTHER" in os.environ, "name": __name__, "imported": sorted({"wave"} & set(sys.modules)),
    "path": sys.path, "leads": os.getsid(0) == os.getpid(),
}))
print("an error", file=sys.stderr)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "a script.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ForkServer]:
    monkeypatch.setenv("ANOTHER", "1")
    made = ForkServer(str(tmp_path / "s"), ["wave", "no_such_module"])
    monkeypatch.delenv("ANOTHER")
    yield made
    made.close()


def run(server: ForkServer, script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*shlex.split(server.command), str(script), *arguments],
        env={**os.environ, **environment},
        cwd=script.parent,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )


def test_a_fork_is_the_process_that_was_asked_for(server: ForkServer, script: Path) -> None:
    done = run(server, script, "--an", "argument with spaces", A_VARIABLE="a value", PYTHONPATH="/a/folder")
    found = json.loads(done.stdout)
    assert found["parent"] == server._process.pid and found["imported"] == ["wave"]
    assert found["arguments"] == ["--an", "argument with spaces"] and found["name"] == "__main__"
    assert found["folder"] == str(script.parent) and found["variable"] == "a value" and not found["others"]
    assert found["path"][:2] == [str(script.parent), "/a/folder"]
    assert str(ROOT / "raylight" / "cluster") not in found["path"], "its modules have names of others"
    assert found["leads"], "who ends the group of one worker would end all"
    assert done.stderr == "an error\n"


def test_an_error_of_a_fork_is_its_own(server: ForkServer, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import os; os.write(1, str(len(os.listdir('/proc/self/fd'))).encode()); open('/no/such/file')")
    with (tmp_path / "errors").open("w+") as errors, (tmp_path / "output").open("w+") as output:
        command = [*shlex.split(server.command), str(broken)]
        subprocess.run(command, stdout=output, stderr=errors, timeout=WAIT_S, check=True)
        deadline = time.monotonic() + WAIT_S
        while "FileNotFoundError" not in (tmp_path / "errors").read_text():
            assert time.monotonic() < deadline, (tmp_path / "errors").read_text()
            time.sleep(0.05)
    assert "ValueError" not in (tmp_path / "errors").read_text()
    assert int((tmp_path / "output").read_text()) == 4, "its standard files and the folder that it lists"


def test_without_the_server_the_client_runs_the_script(server: ForkServer, script: Path) -> None:
    server.close()
    assert server._process.returncode == 0
    found = json.loads(run(server, script, "x").stdout)
    assert found["parent"] == os.getpid() and found["arguments"] == ["x"]


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (
            "import threading, time; threading.Thread(target=time.sleep, args=(600,), daemon=True).start()",
            "the import of harmful has started threads (python, python)",
        ),
        ("exit(3)", "its process has ended (exit status 3)"),
    ],
)
def test_a_module_that_cannot_be_forked(
    harm: str, why: str, tmp_path: Path, script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "harmful.py").write_text(harm)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    server = ForkServer(str(tmp_path / "s"), ["harmful"])
    assert json.loads(run(server, script).stdout)["parent"] == os.getpid()
    server._process.wait(WAIT_S)
    assert server.why_ended() == why
    server.close()


# A driver and a management library as far as the server asks them: calls fail before they are initialised.
DRIVER = """
static int begun;
int cuInit(int flags) { begun = 1; return 0; }
int cuDeviceGetCount(int *count) { return begun ? 0 : 3; }
"""
NVML = """
#include <fcntl.h>
#include <unistd.h>
static int begun, file;
int nvmlInit_v2(void) { if (begun++ == 0) file = open("FILE", O_RDONLY); return 0; }
int nvmlShutdown(void) { if (begun == 0) return 1; if (--begun == 0) close(file); return 0; }
int begun_times(void) { return begun; }
"""


def compiled(folder: Path, soname: str, source: str) -> Path:
    compiler = shutil.which("cc") or pytest.skip("needs a C compiler")
    code, library = folder / f"{soname}.c", folder / soname
    code.write_text(source)
    subprocess.run([compiler, "-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", library, code], check=True)
    return library


@pytest.mark.parametrize("starts", [False, True])
def test_a_module_that_starts_cuda(starts: bool, tmp_path: Path, script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = compiled(tmp_path, "libcuda.so.1", DRIVER)
    (tmp_path / "harmful.py").write_text(
        f"import ctypes; library = ctypes.CDLL({str(library)!r}){'; library.cuInit(0)' * starts}"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    server = ForkServer(str(tmp_path / "s"), ["harmful"])
    is_forked = json.loads(run(server, script).stdout)["parent"] == server.pid
    assert is_forked is not starts
    if starts:
        server._process.wait(WAIT_S)
    assert server.why_ended() == ("the import of harmful has started CUDA" if starts else None)
    server.close()


def test_a_module_that_asks_nvml_for_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is forked, and NVML has ended before: each fork begins it with files of its own."""
    file = tmp_path / "nvidiactl"
    file.touch()
    library = compiled(tmp_path, "libnvidia-ml.so.1", NVML.replace("FILE", str(file)))
    (tmp_path / "asks.py").write_text(
        f"import ctypes; library = ctypes.CDLL({str(library)!r}); library.nvmlInit_v2(); library.nvmlInit_v2()"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    asks = tmp_path / "asks_in_fork.py"
    asks.write_text(
        "import asks, json, os\n"
        "files = [os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd') if n != '3']\n"
        "print(json.dumps({'parent': os.getppid(), 'begun': asks.library.begun_times(), 'files': files}))"
    )
    server = ForkServer(str(tmp_path / "s"), ["asks"])
    found = json.loads(run(server, asks).stdout)
    assert found["parent"] == server.pid and found["begun"] == 0 and str(file) not in found["files"]
    assert list(server.import_seconds()) == ["asks"]
    server.close()


def test_a_module_that_is_tried_first_is_left_out_if_it_starts_threads(
    tmp_path: Path, script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = "import threading, time; threading.Thread(target=time.sleep, args=(600,), daemon=True).start()"
    (tmp_path / "harmful.py").write_text(start)
    (tmp_path / "fatal.py").write_text("import os; os._exit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    server = ForkServer(str(tmp_path / "s"), ["queue"], ["harmful", "fatal", "wave"])
    found = json.loads(run(server, script).stdout)
    assert found["parent"] == server.pid and found["imported"] == ["wave"]
    assert list(server.import_seconds()) == ["queue", "wave"]
    left_out = server.left_out()
    assert left_out["harmful"].startswith("has started threads") and "status" in left_out["fatal"]
    server.close()


@pytest.mark.slow
def test_a_module_whose_trial_does_not_end_is_left_out(tmp_path: Path, script: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "endless.py").write_text("import time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    server = ForkServer(str(tmp_path / "s"), ["queue"], ["endless"])
    deadline = time.monotonic() + WAIT_S
    while not server.left_out():
        assert time.monotonic() < deadline and server.why_ended() is None
        time.sleep(0.1)
    assert server.left_out()["endless"] == "has not ended within 20 s"
    assert json.loads(run(server, script).stdout)["parent"] == server.pid
    server.close()


def test_libraries_are_told_of_a_gpu_while_they_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("from . import cuda")
    (tmp_path / "torch" / "cuda.py").write_text("def is_available(): return 'asks'")
    (tmp_path / "asks.py").write_text("import torch; told = torch.cuda.is_available()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    shows = tmp_path / "shows.py"
    shows.write_text("import asks, torch; print(asks.told, torch.cuda.is_available())")
    for has_gpu in (True, False):
        server = ForkServer(str(tmp_path / f"s{has_gpu}"), ["torch"], ["asks"], has_gpu=has_gpu)
        assert run(server, shows).stdout == ("True asks\n" if has_gpu else "asks asks\n")
        server.close()


def test_libraries_are_loaded_with_the_variables_of_workers(tmp_path: Path) -> None:
    """PyTorch chooses its allocator when it is loaded, and that of ComfyUI is not for workers."""
    (tmp_path / "reads.py").write_text("import os; found = os.environ.get('PYTORCH_CUDA_ALLOC_CONF')")
    shows = tmp_path / "shows.py"
    shows.write_text("import reads; print(reads.found)")
    server = ForkServer(
        str(tmp_path / "s"), ["reads"], variables={"PYTORCH_CUDA_ALLOC_CONF": "", "PYTHONPATH": str(tmp_path)}
    )
    found = run(server, shows, PYTORCH_CUDA_ALLOC_CONF="backend:cudaMallocAsync")
    assert found.stdout == "\n"
    server.close()


def test_workers_of_ray_are_forked() -> None:
    config = SessionConfig(MeshShape(ulysses=2), "cpu")
    forked: list[int] = []

    def parents() -> set[int]:
        session = active_session.session(config, SERVICE)
        assert session.run(EchoService.count, 1) == ("rank 0 of 2", "settings", 1)
        assert session.times is not None and "actor" in session.times.ranks and "met" in session.times.session
        forked.append(session.times.forked)
        return {psutil.Process(place.pid).ppid() for place in session.places.values()}

    try:
        active_session.close()
        assert parents() == {RUNTIME._fork_server._process.pid}
        active_session.close(keep_ray=True)
        server = psutil.Process(RUNTIME._fork_server._process.pid)
        assert parents() == {server.pid}, "the end of workers has ended it too"

        active_session.close(keep_ray=True)
        server.kill()
        assert server.pid not in parents()
        assert forked == [2, 2, 0]
    finally:
        active_session.close()
    assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE


def test_a_service_without_imports_has_no_such_process() -> None:
    try:
        active_session.close()
        session = active_session.session(
            SessionConfig(MeshShape(ulysses=1), "cpu"), replace(SERVICE, forked_imports=())
        )
        assert RUNTIME.worker_command is None and session.alive
    finally:
        active_session.close()


def test_comfyuis_libraries_can_be_forked(tmp_path: Path, script: Path) -> None:
    """None of those that are named starts a thread or CUDA."""
    from raylight.host.settings import LIBRARIES, LIBRARIES_FOR_GPUS

    server = ForkServer(str(tmp_path / "s"), LIBRARIES, LIBRARIES_FOR_GPUS, has_gpu=True)
    deadline = time.monotonic() + 3 * WAIT_S  # a client that waited for all of these imports might give up
    while len(server.import_seconds()) + len(server.left_out()) < len({*LIBRARIES, *LIBRARIES_FOR_GPUS}):
        assert time.monotonic() < deadline and server.why_ended() is None
        time.sleep(0.1)
    found = json.loads(run(server, script).stdout)
    assert found["parent"] == server._process.pid, "it has ended by itself"
    assert set(server.import_seconds()) == {*LIBRARIES, *LIBRARIES_FOR_GPUS} and server.left_out() == {}
    server.close()
