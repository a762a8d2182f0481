"""GPU variables, folders and limits of users' machines, for a local Ray."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from raylight.cluster import ray_environment

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("environ", "is_rocm", "seen", "first", "second"),
    [
        ({}, False, None, 0, {"CUDA_VISIBLE_DEVICES": "1"}),
        ({"CUDA_VISIBLE_DEVICES": "4,6"}, False, ["4", "6"], 4, {"CUDA_VISIBLE_DEVICES": "6"}),
        (
            {"CUDA_VISIBLE_DEVICES": "GPU-0a, GPU-1b"},
            False,
            ["GPU-0a", "GPU-1b"],
            None,
            {"CUDA_VISIBLE_DEVICES": "GPU-1b"},
        ),
        (
            {"CUDA_VISIBLE_DEVICES": "3,4", "HIP_VISIBLE_DEVICES": "0,1"},
            False,
            ["3", "4"],
            3,
            {"CUDA_VISIBLE_DEVICES": "4"},
        ),
        ({}, True, None, 0, {"CUDA_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "1"}),
        (
            {"HIP_VISIBLE_DEVICES": "5,7"},
            True,
            ["5", "7"],
            5,
            {"CUDA_VISIBLE_DEVICES": "7", "HIP_VISIBLE_DEVICES": "7"},
        ),
        # ComfyUI's --default-device sets both; HIP's decides.
        (
            {"CUDA_VISIBLE_DEVICES": "0,1", "HIP_VISIBLE_DEVICES": "1,0"},
            True,
            ["1", "0"],
            1,
            {"CUDA_VISIBLE_DEVICES": "0", "HIP_VISIBLE_DEVICES": "0"},
        ),
        (
            {"CUDA_VISIBLE_DEVICES": "2,3"},
            True,
            ["2", "3"],
            2,
            {"CUDA_VISIBLE_DEVICES": "3", "HIP_VISIBLE_DEVICES": "3"},
        ),
        # HIP's numbers count the GPUs that ROCR leaves.
        (
            {"ROCR_VISIBLE_DEVICES": "4,5,6", "HIP_VISIBLE_DEVICES": "1,2"},
            True,
            ["1", "2"],
            5,
            {"CUDA_VISIBLE_DEVICES": "2", "HIP_VISIBLE_DEVICES": "2"},
        ),
        (
            {"ROCR_VISIBLE_DEVICES": "GPU-0a", "HIP_VISIBLE_DEVICES": "0,0"},
            True,
            ["0", "0"],
            None,
            {"CUDA_VISIBLE_DEVICES": "0", "HIP_VISIBLE_DEVICES": "0"},
        ),
    ],
)
def test_which_gpus_a_process_sees(
    environ: dict[str, str], is_rocm: bool, seen: list[str] | None, first: int | None, second: dict[str, str]
) -> None:
    assert ray_environment.visible_gpus(environ, is_rocm) == seen
    assert ray_environment.machine_gpu_index(environ, is_rocm) == first
    switches = {f"RAY_EXPERIMENTAL_NOSET_{name}": "1" for name in second}
    assert ray_environment.select_gpu(1, environ, is_rocm) == second | switches


def test_rays_switches_are_those_of_this_ray() -> None:
    from ray._private.accelerators import amd_gpu, nvidia_gpu

    assert {amd_gpu.NOSET_HIP_VISIBLE_DEVICES_ENV_VAR, nvidia_gpu.NOSET_CUDA_VISIBLE_DEVICES_ENV_VAR} == {
        name for name in ray_environment.select_gpu(0, {}, True) if name.startswith("RAY")
    }


def test_ray_on_rocm_takes_rocr(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.accelerators.amd_gpu import AMDGPUAcceleratorManager

    monkeypatch.delenv("HIP_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "4,5")
    with pytest.raises(RuntimeError):
        AMDGPUAcceleratorManager.get_current_process_visible_accelerator_ids()
    before = ray_environment.prepare(is_local=True, is_rocm=True)
    try:
        assert AMDGPUAcceleratorManager.get_current_process_visible_accelerator_ids() == ["0", "1"]
    finally:
        ray_environment.restore(before)
    assert "HIP_VISIBLE_DEVICES" not in os.environ
    assert ray_environment.hip_variables({"ROCR_VISIBLE_DEVICES": "4,5", "CUDA_VISIBLE_DEVICES": "1"}, True) == {
        "HIP_VISIBLE_DEVICES": "1"
    }
    assert ray_environment.hip_variables({"ROCR_VISIBLE_DEVICES": "4,5", "HIP_VISIBLE_DEVICES": "1"}, True) == {}


@pytest.mark.parametrize(
    ("given", "changes"),
    [
        ({}, True),
        ({"RAY_AUTH_MODE": "token"}, True),
        ({"RAY_AUTH_TOKEN": "a" * 64}, False),
        ({"RAY_AUTH_TOKEN_PATH": "/somewhere"}, False),
        ({"RAY_AUTH_MODE": "disabled"}, False),
    ],
)
def test_a_token_for_one_start(given: dict[str, str], changes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    made = set()
    for _ in range(2):
        before = ray_environment.prepare(is_local=True, is_rocm=False)
        made.add(os.environ.get("RAY_AUTH_TOKEN"))
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # as Ray does
        ray_environment.restore(before)
        if changes:
            assert {name for name in os.environ if name.startswith("RAY_AUTH")} == set(given)
    assert len(made) == (2 if changes else 1) and (changes or made == {given.get("RAY_AUTH_TOKEN")})
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)


def test_variables_that_are_reported() -> None:
    assert ray_environment.user_variables({"RAY_TMPDIR": "/x", "RAY_AUTH_TOKEN": "secret", "PATH": "/bin"}) == ""
    sentence = ray_environment.user_variables({"RAY_OVERRIDE_RESOURCES": '{"CPU": 1}', "RAY_AUTH_TOKEN": "secret"})
    assert 'RAY_OVERRIDE_RESOURCES={"CPU": 1},' in sentence and "secret" not in sentence


def test_a_folder_of_any_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("short", "a" * 100, "é"):
        monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / name))
        (tmp_path / name).mkdir()
        folder = ray_environment.make_folder()
        assert ray_environment.fits_sockets(folder.path)
        assert all(os.stat(own).st_mode & 0o777 == 0o700 for own in folder.owned), "for this user alone"
        Path(folder.path, "there").mkdir(parents=True)
        assert list((tmp_path / name).glob("raylight-*/r/there"))
        folder.remove()
        assert not any(os.path.lexists(own) for own in folder.owned) and not list((tmp_path / name).iterdir())


def test_a_folder_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("a" * 100)
    long.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    monkeypatch.setattr(ray_environment, "_SHORT_ROOTS", (str(long), "/proc"))
    with pytest.raises(
        ray_environment.FolderError, match=rf"has {len(str(long))} bytes, .* at most \d+ bytes"
    ) as error:
        ray_environment.make_folder()
    assert not list(long.iterdir())
    most = int(re.search(r"at most (\d+) bytes", str(error.value)).group(1))
    assert ray_environment.fits_sockets("/" + "a" * (most - 1) + "/raylight-12345678/r")
    assert not ray_environment.fits_sockets("/" + "a" * most + "/raylight-12345678/r")


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/proc/none")
    with pytest.raises(
        ray_environment.FolderError,
        match=r"No such file or directory: /proc/none\. Ray's temporary files go to /proc/none; .* Free space there",
    ):
        ray_environment.make_folder()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (PermissionError(errno.EACCES, "Permission denied", "/x/raylight-1/r/session"), True),
        (PermissionError(errno.EACCES, "Permission denied", "/home/of/somebody"), False),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/proc/none"), False),
        (ValueError("The configured object store size exceeds /dev/shm"), False),
        (ModuleNotFoundError("No module named 'not_there'"), False),
    ],
)
def test_when_the_folder_is_the_root_cause(error: Exception, expected: bool) -> None:
    folder = ray_environment.RayFolder("/x/raylight-1/r", ("/x/raylight-1",))
    assert ray_environment.is_folder_error(error, folder) is expected


_STARTS = """
import os, sys, time
sys.path[:0] = sys.argv[1:3]
import echo_service
from raylight.cluster import active_session
from raylight.cluster.config import ServiceSpec, SessionConfig
from raylight.parallel.mesh import MeshShape

def start(**changes):
    service = ServiceSpec("echo_service:open_service", None, tuple(sys.argv[1:3]))
    began = time.monotonic()
    try:
        session = active_session.session(SessionConfig(MeshShape(ulysses=2), "cpu", **changes), service)
        print(session.run(echo_service.EchoService.count, 3)[0])
    except Exception as error:
        print(f"{time.monotonic() - began:.1f} s: {error}".replace("\\n", " "))
    active_session.close()
"""


def starts(code: str, **environ: str) -> list[str]:
    """Return the lines, one for each session, that a process prints which runs `code`."""
    process = subprocess.run(
        [sys.executable, "-c", _STARTS + code, str(ROOT), str(ROOT / "tests" / "support")],
        text=True,
        env={**os.environ, "PYTHONPATH": "", **environ},
        capture_output=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


@pytest.mark.slow
def test_no_home_and_a_long_folder(tmp_path: Path) -> None:
    folder = tmp_path / ("é" * 60)
    folder.mkdir()
    assert starts("start()", HOME="/proc/none", RAY_TMPDIR=str(folder)) == ["rank 0 of 2"]
    assert not list(folder.iterdir())


@pytest.mark.slow
def test_what_keeps_ray_from_starting_is_named() -> None:
    small, hook, store = starts(
        "from raylight.cluster import placement; placement._LOCAL_S = 600\n"
        "os.environ['RAY_OVERRIDE_RESOURCES'] = '{\"CPU\": 1}'; start()\n"
        "del os.environ['RAY_OVERRIDE_RESOURCES']\n"
        "os.environ['RAY_RUNTIME_ENV_HOOK'] = 'not_there.hook'; start()\n"
        "del os.environ['RAY_RUNTIME_ENV_HOOK']\n"
        "start(object_store_bytes=10**15)\n"
    )
    assert re.search(
        r"2 workers need 1 CPU each, but Ray has 1 CPU\. Lower GPU\. ComfyUI was started with "
        r'RAY_OVERRIDE_RESOURCES={"CPU": 1}, which changes Ray: try without\.$',
        small,
    )
    assert re.search(
        r"No module named 'not_there'\. ComfyUI was started with RAY_RUNTIME_ENV_HOOK=not_there\.hook, "
        r"which changes Ray: try without\.$",
        hook,
    )
    assert "Ray does not start on this machine: " in store and store.count("..") == store.count("...")
    assert float(small.split()[0]) < 200, "it waited for resources that never come"
    assert not any("temporary files" in line for line in (small, hook, store))


def test_a_cluster_is_shown_the_token_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (ray_environment.TOKEN, ray_environment.TOKEN_PATH, ray_environment.AUTH_MODE):
        monkeypatch.delenv(name, raising=False)
    assert ray_environment.prepare(is_local=False, is_rocm=False) == {}
    ray_environment.default_token().parent.mkdir()
    ray_environment.default_token().write_text("a" * 64)
    before = ray_environment.prepare(is_local=False, is_rocm=False)
    assert os.environ[ray_environment.AUTH_MODE] == "token"
    ray_environment.restore(before)
    assert ray_environment.AUTH_MODE not in os.environ
    monkeypatch.setenv(ray_environment.AUTH_MODE, "disabled")
    assert ray_environment.prepare(is_local=False, is_rocm=False) == {}
