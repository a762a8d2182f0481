"""The command line: what it runs, and its messages when it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from raylight.dev.setup import bootstrap
from raylight.dev.setup.comfyui import ComfyUI
from raylight.dev.setup.environment import Environment
from raylight.dev.setup.report import SetupError

ROOT = Path(__file__).resolve().parents[2]


def as_file(*arguments: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run it by its path as a user does, without this process's import path."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "COMFYUI_PATH")}
    script = ROOT / "raylight" / "dev" / "setup" / "bootstrap.py"
    return subprocess.run(
        [sys.executable, str(script), *arguments], cwd=cwd, env={**clean, **environ}, capture_output=True, text=True
    )


def test_comfyui_path_prints_only_the_path(tmp_path: Path) -> None:
    for name in ("main.py", "nodes.py"):
        (tmp_path / name).touch()
    (tmp_path / "comfy").mkdir()
    result = as_file("comfyui-path", cwd=Path(tmp_path.anchor), COMFYUI_PATH=str(tmp_path))
    assert (result.returncode, result.stdout) == (0, f"{tmp_path}\n")


def test_rejects_wrong_comfyui_path_first(tmp_path: Path) -> None:
    result = as_file("setup", cwd=tmp_path, COMFYUI_PATH=str(tmp_path))
    assert result.returncode == 1
    assert "is not a ComfyUI" in result.stderr and "Traceback" not in result.stderr
    assert "environment" not in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["setup", "more"],
        ["check", "more"],
        ["comfyui-path", "more"],
        ["--comfyui"],
        ["--comfyui", "0.24"],
    ],
)
def test_rejects_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bootstrap.main(arguments) == 2
    assert "COMMAND" in capsys.readouterr().err


def test_rejects_old_python() -> None:
    bootstrap.check_python((3, 10))
    with pytest.raises(SetupError, match="this is Python 3.9, but 3.10 or later is needed"):
        bootstrap.check_python((3, 9))


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], Path, dict[str, str]]]:
    """Pretend that everything is set up, and collect the commands."""
    runs: list[tuple[list[str], Path, dict[str, str]]] = []
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(bootstrap, "set_up", lambda _: (ComfyUI(tmp_path, "here"), Environment(tmp_path / "venv")))
    monkeypatch.setattr(
        bootstrap,
        "set_up_release",
        lambda checkout, release, *_: (ComfyUI(tmp_path / release, "here"), Environment(tmp_path / f"venv-{release}")),
    )
    monkeypatch.setattr(bootstrap, "run_child", lambda command, cwd, environ: runs.append((command, cwd, environ)) or 5)
    return runs


@pytest.mark.parametrize(
    ("arguments", "program"),
    [
        (["demo"], ["-m", "raylight.dev.demo"]),
        (["demo", "--steps", "2"], ["-m", "raylight.dev.demo", "--steps", "2"]),
        (["test"], ["-m", "pytest", "-q", "-m", "not slow", "tests"]),
        (["test", "--durations=5"], ["-m", "pytest", "-q", "-m", "not slow", "tests", "--durations=5"]),
        (["test", "-mslow"], ["-m", "pytest", "-q", "tests", "-mslow"]),
        (["test", "--lf"], ["-m", "pytest", "-q", "tests", "--lf"]),
        (["test-all"], ["-m", "pytest", "-q", "tests"]),
        (["test-all", "tests/setup"], ["-m", "pytest", "-q", "tests/setup"]),
        (["test", "-k", "tests"], ["-m", "pytest", "-q", "tests", "-k", "tests"]),
        (["test", "-x", "tests/setup"], ["-m", "pytest", "-q", "-x", "tests/setup"]),
        (["test", "tests/setup/test_link.py::t"], ["-m", "pytest", "-q", "tests/setup/test_link.py::t"]),
        (["smoke"], ["-m", "pytest", "-q", "-m", "smoke", "tests"]),
        (["check"], ["-m", "raylight.dev.check"]),
        (["test-gpu", "-k", "lora"], ["-m", "pytest", "-q", "-rs", "tests/gpu", "-k", "lora"]),
        (["lint"], ["-m", "ruff", "check"]),
        (["format", "--check"], ["-m", "ruff", "format", "--check"]),
    ],
)
def test_runs_program_in_environment(
    ready: list[tuple[list[str], Path, dict[str, str]]], tmp_path: Path, arguments: list[str], program: list[str]
) -> None:
    assert bootstrap.main(arguments) == 5
    ((command, cwd, environ),) = ready
    assert command == [str(Environment(tmp_path / "venv").python), *program]
    assert cwd == ROOT and environ["COMFYUI_PATH"] == str(tmp_path)


def test_types_use_environment_and_comfyui(ready: list[tuple[list[str], Path, dict[str, str]]], tmp_path: Path) -> None:
    bootstrap.main(["types"])
    ((command, _, environ),) = ready
    assert command[1:] == ["-m", "basedpyright", "--pythonpath", command[0]]
    assert environ["PYTHONPATH"] == str(tmp_path)


def test_checks_a_comfyui_beside_what_is_set_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it wants in other versions goes into an environment of its own, and nothing into `.venv`."""
    own = tmp_path / "own"
    for name in ("main.py", "nodes.py", "comfy/ops.py", "requirements.txt", "comfyui_version.py"):
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_text('__version__ = "0.99.1"\n')
    asked: list[object] = []
    runs: list[tuple[list[str], str]] = []
    env = Environment(tmp_path / ".venv")
    monkeypatch.setenv("COMFYUI_PATH", str(own))
    monkeypatch.setattr(bootstrap, "set_up", lambda _, environ: asked.append(environ) or (None, env))
    monkeypatch.setattr(bootstrap.overlay, "create_over", lambda below, root: Environment(root))
    monkeypatch.setattr(bootstrap.overlay, "requirements_over", lambda *_: None)
    monkeypatch.setattr(bootstrap.environment, "install", lambda over, *_: True)
    monkeypatch.setattr(
        bootstrap, "run_child", lambda command, cwd, environ: runs.append((command, environ["COMFYUI_PATH"])) or 0
    )
    assert bootstrap.main(["check"]) == 0
    python = Environment(ROOT / ".venv-0.99").python
    assert asked == [{}] and runs == [([str(python), "-m", "raylight.dev.check"], str(own))]
    assert not (own / "custom_nodes").exists()


def test_runs_with_release(ready: list[tuple[list[str], Path, dict[str, str]]], tmp_path: Path) -> None:
    assert bootstrap.main(["--comfyui", "0.24", "test", "-x"]) == 5
    ((command, _, environ),) = ready
    assert command[0] == str(Environment(tmp_path / "venv-0.24").python)
    assert environ["COMFYUI_PATH"] == str(tmp_path / "0.24")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--comfyui", "0.25", "setup"], "COMFYUI = 0.25 is no release"),
        (
            ["--comfyui", "0.24", "setup"],
            "COMFYUI = 0.24 names a release of ComfyUI, but COMFYUI_PATH names yours in /my",
        ),
    ],
)
def test_rejects_release_first(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMFYUI_PATH", "/my")
    monkeypatch.delattr(bootstrap, "set_up")
    assert bootstrap.main(arguments) == 1
    assert message in capsys.readouterr().err


def test_setup_runs_no_program(ready: list[tuple[list[str], Path, dict[str, str]]]) -> None:
    assert bootstrap.main(["setup"]) == 0 and ready == []


def test_interrupted_setup(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(_: list[Path]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bootstrap, "set_up", interrupt)
    assert bootstrap.main(["setup"]) == 130
    assert "run the same command again" in capsys.readouterr().err
