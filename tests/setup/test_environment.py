"""When pip is called, and when the stamp makes that needless."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from raylight.dev.setup import environment
from raylight.dev.setup.environment import Environment, Requirements
from raylight.dev.setup.report import SetupError, run_tool


class Pretended(Environment):
    """An environment without a Python."""

    python_version = "3.12"

    def version(self) -> str:
        return self.python_version


class Pip:
    """A substitute for pip that counts its calls, and raises `outcome` if that is an exception."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.outcome: BaseException | None = None

    def __call__(self, command: list[str], *, log: Path, failure: str) -> None:
        self.commands.append(command)
        if self.outcome is not None:
            raise self.outcome


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Pip:
    fake = Pip()
    monkeypatch.setattr(environment, "run_tool", fake)
    return fake


@pytest.fixture
def env(tmp_path: Path) -> Pretended:
    (tmp_path / ".venv").mkdir()
    return Pretended(tmp_path / ".venv")


@pytest.fixture
def wanted(tmp_path: Path) -> Requirements:
    file = tmp_path / "requirements.txt"
    file.write_text("ray\n")
    return Requirements((file,), ("torch==1", "pytest", "pytest"))


def test_second_run_skips_pip(env: Pretended, wanted: Requirements, pip: Pip) -> None:
    assert environment.install(env, wanted) and not environment.install(env, wanted)
    (command,) = pip.commands
    assert command[1:] == ["-m", "pip", "install", "torch==1", "pytest", "--requirement", str(wanted.files[0])]


def test_fingerprint_covers_every_input(
    env: Pretended, wanted: Requirements, pip: Pip, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment.install(env, wanted)
    wanted.files[0].write_text("ray\nnumpy\n")
    assert environment.install(env, wanted)
    wanted = Requirements(wanted.files, ("torch==2",))
    assert environment.install(env, wanted)
    monkeypatch.setattr(Pretended, "python_version", "3.13")
    assert environment.install(env, wanted) and not environment.install(env, wanted)
    assert len(pip.commands) == 4


@pytest.mark.parametrize("outcome", [KeyboardInterrupt(), SetupError("no network")])
def test_no_stamp_after_failed_install(env: Pretended, wanted: Requirements, pip: Pip, outcome: BaseException) -> None:
    environment.install(env, wanted)
    first = wanted.files[0].read_text()
    wanted.files[0].write_text("numpy\n")
    pip.outcome = outcome
    with pytest.raises(type(outcome)):
        environment.install(env, wanted)
    assert not env.stamp.exists()

    wanted.files[0].write_text(first)  # as when the stamp was valid, but the environment no longer is
    pip.outcome = None
    assert environment.install(env, wanted)


def test_requirements(tmp_path: Path) -> None:
    for folder in ("host", "pack"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "requirements.txt").touch()
    (tmp_path / "pack" / "pyproject.toml").write_text(
        '[project.optional-dependencies]\ntest = [\n  "pytest[x]>=8", # why\n]\ndemo = ["é"]\nother = ["no"]\n', "utf-8"
    )
    found = environment.requirements(Environment(Path(sys.prefix)), tmp_path / "pack", tmp_path / "host")
    assert found.single == (*environment.TORCH, "pytest[x]>=8", "é")
    assert found.files == (tmp_path / "host" / "requirements.txt", tmp_path / "pack" / "requirements.txt")


def test_rejects_comfyui_without_requirements(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="requirements.txt is missing"):
        environment.requirements(Environment(Path(sys.prefix)), tmp_path, tmp_path)


def test_rejects_environment_without_python(tmp_path: Path) -> None:
    env = Environment(tmp_path)
    env.python.parent.mkdir()
    env.python.symlink_to(tmp_path / "gone")
    with pytest.raises(SetupError, match=f"does not run .* Delete {tmp_path} and run again"):
        environment.create(env)


def test_failed_tool_shows_output(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = "print('\\n'.join(f'line {i}' for i in range(50))); raise SystemExit(3)"
    with pytest.raises(SetupError) as error:
        run_tool([sys.executable, "-c", script], log=log, failure="it failed, do this")
    text = str(error.value)
    assert text.startswith("it failed, do this") and "line 49" in text and "line 30" in text and "line 29" not in text
