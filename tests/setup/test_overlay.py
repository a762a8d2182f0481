"""An environment over another one: it sees the one below and never changes it."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from raylight.dev.setup import bootstrap, comfyui, environment, overlay
from raylight.dev.setup.environment import Environment
from raylight.dev.setup.report import SetupError


def add_package(env: Environment, name: str, version: str) -> None:
    """Write files that Python and pip take for an installed package."""
    (env.packages() / f"{name}.py").write_text(f"version = {version!r}\n")
    info = env.packages() / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "INSTALLER").write_text("pip\n")
    files = [f"{name}.py", *(f"{info.name}/{entry}" for entry in ("METADATA", "INSTALLER", "RECORD"))]
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


def make_wheel(folder: Path, name: str, version: str) -> None:
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"version = {version!r}\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def version(env: Environment, name: str) -> str:
    script = f"import {name}, importlib.metadata; print({name}.version, importlib.metadata.version({name!r}))"
    module, metadata = subprocess.run(
        [str(env.python), "-c", script], capture_output=True, text=True, check=True
    ).stdout.split()
    assert module == metadata
    return module


@pytest.fixture
def below(tmp_path: Path) -> Environment:
    """A real environment with a pip."""
    env = Environment(tmp_path / "below")
    venv.EnvBuilder(with_pip=True).create(env.root)
    env.stamp.write_text("first\n")
    return env


@pytest.mark.slow
def test_installs_only_differences(below: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("raylight_shared", "raylight_pinned"):
        add_package(below, name, "2.0")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    make_wheel(wheels, "raylight_pinned", "1.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setattr(overlay, "TORCH", ("raylight_shared==2.0",))
    (tmp_path / "requirements.txt").write_text("raylight_shared\nraylight_pinned==1.0\n")

    over = overlay.create_over(below, tmp_path / ".venv-0.24")
    wanted = overlay.requirements_over(below, tmp_path)
    assert environment.install(over, wanted, "two packages") and not environment.install(over, wanted)
    assert (version(over, "raylight_shared"), version(over, "raylight_pinned")) == ("2.0", "1.0")
    assert (version(below, "raylight_shared"), version(below, "raylight_pinned")) == ("2.0", "2.0")
    assert not list(over.packages().glob("raylight_shared*"))

    below.stamp.write_text("another\n")  # what is missing on top may have changed
    assert environment.install(over, overlay.requirements_over(below, tmp_path))


def test_newest_release_needs_no_overlay(tmp_path: Path) -> None:
    host = comfyui.ComfyUI(comfyui.cached_root(tmp_path, "0.30.0"), "unpacked here")
    env = Environment(tmp_path / ".venv")
    assert bootstrap.set_up_release(tmp_path, "0.30", host, env) == (host, env)


def test_overlay_root(tmp_path: Path) -> None:
    roots = [overlay.overlay_root(tmp_path, release) for release in comfyui.PINNED]
    assert [root.name for root in roots] == [".venv-0.24", ".venv-0.27", ".venv-0.30"]


def test_rejects_environment_without_python(tmp_path: Path) -> None:
    over = Environment(tmp_path / "over")
    over.python.parent.mkdir(parents=True)
    over.python.symlink_to(tmp_path / "gone")
    with pytest.raises(SetupError, match=f"does not run .* Delete {over.root} and run again"):
        overlay.create_over(Environment(Path(sys.prefix)), over.root)
