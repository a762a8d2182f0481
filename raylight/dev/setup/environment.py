"""The checkout's own virtual environment, and a stamp that marks it complete."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from raylight.dev.setup.report import SetupError, run_tool, say

TORCH = ("torch==2.14.1", "torchvision==0.29.1", "torchaudio==2.11.0")
"""Pinned: ComfyUI accepts any versions of the three, but only some fit together."""
EXTRAS = ("test", "demo")
ALL = "PyTorch, ComfyUI's requirements and Ray (some GB, minutes)"


@dataclass(frozen=True)
class Environment:
    """A virtual environment, which may not exist yet."""

    root: Path

    @property
    def python(self) -> Path:
        return self.root / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def stamp(self) -> Path:
        return self.root / "raylight-setup.sha256"

    @property
    def log(self) -> Path:
        return self.root / "raylight-setup.log"

    def version(self) -> str:
        """Return its Python's version, such as "3.12". Raises SetupError: that Python does not run."""
        try:
            return self._ask("import sys; print('%d.%d' % sys.version_info[:2])")
        except (OSError, subprocess.CalledProcessError) as error:
            raise SetupError(f"{self.python} does not run ({error}). Delete {self.root} and run again.") from error

    def packages(self) -> Path:
        """Return its site-packages."""
        return Path(self._ask("import sysconfig; print(sysconfig.get_path('purelib'))"))

    def has_pip(self) -> bool:
        return self._ask("import importlib.util; print(importlib.util.find_spec('pip') is not None)") == "True"

    def optional_dependencies(self, pyproject: Path) -> dict[str, list[str]]:
        """Return the extras of a pyproject.toml; Python 3.10 has no tomllib and reads it with the tomli inside pip."""
        script = (
            "import json\n"
            "try: import tomllib\n"
            "except ModuleNotFoundError: from pip._vendor import tomli as tomllib\n"
            f"with open({str(pyproject)!r}, 'rb') as file:\n"
            "    print(json.dumps(tomllib.load(file)['project']['optional-dependencies']))"
        )
        return json.loads(self._ask(script))

    def _ask(self, script: str) -> str:
        """Run a script there and return its output."""
        return subprocess.run(
            [str(self.python), "-I", "-c", script], stdout=subprocess.PIPE, text=True, check=True
        ).stdout.strip()


def create(environment: Environment) -> None:
    """Create the environment if it is missing or has no pip (an interrupted run, or a Python upgraded in place)."""
    if os.path.lexists(environment.python):
        environment.version()
        if environment.has_pip():
            return
    say(f"making the environment {environment.root}")
    remedy = "Install the rest of Python (on Debian and Ubuntu: apt install python3-venv), or use another Python."
    if any(importlib.util.find_spec(module) is None for module in ("venv", "ensurepip")):
        raise SetupError(f"this Python cannot make virtual environments: venv or ensurepip is missing. {remedy}")
    import venv

    try:
        venv.EnvBuilder(with_pip=True, symlinks=os.name != "nt").create(environment.root)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetupError(f"the environment {environment.root} could not be made: {error}. {remedy}") from error


@dataclass(frozen=True)
class Requirements:
    """All that is installed: requirement files, single requirements, and the state of the environment below, if any."""

    files: tuple[Path, ...]
    single: tuple[str, ...]
    below: str = ""

    def fingerprint(self, python_version: str) -> str:
        """Return a hash that changes with everything that could change what is installed."""
        content = [file.read_text("utf-8") for file in self.files]
        return hashlib.sha256(json.dumps([python_version, self.single, content, self.below]).encode()).hexdigest()


def requirements(environment: Environment, checkout: Path, comfyui: Path) -> Requirements:
    files = (comfyui / "requirements.txt", checkout / "requirements.txt")
    for file in files:
        if not file.is_file():
            raise SetupError(f"{file} is missing. Get a complete copy of what it belongs to.")
    extras = environment.optional_dependencies(checkout / "pyproject.toml")
    return Requirements(files, TORCH + tuple(line for extra in EXTRAS for line in extras[extra]))


def install(environment: Environment, wanted: Requirements, what: str = ALL) -> bool:
    """Update the environment with at most one call of pip. Return whether pip was called.

    `what` describes the packages in the log.
    """
    fingerprint = wanted.fingerprint(environment.version())
    if environment.stamp.exists() and environment.stamp.read_text("utf-8").strip() == fingerprint:
        return False
    # Removed before the first change and written after the last, so an interrupted run never counts as complete.
    environment.stamp.unlink(missing_ok=True)
    say(f"installing {what} into {environment.root.name}")
    command = [str(environment.python), "-m", "pip", "install", *dict.fromkeys(wanted.single)]
    for file in wanted.files:
        command += ["--requirement", str(file)]
    run_tool(
        command,
        log=environment.log,
        failure="pip could not install the requirements. Check the network, the free disk space and your pip "
        "configuration (index, proxy), then run the command again: downloads are kept.",
    )
    fresh = environment.stamp.with_suffix(".new")
    fresh.write_text(fingerprint + "\n", "utf-8")
    fresh.replace(environment.stamp)
    return True
