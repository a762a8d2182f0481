"""The versions of what ComfyUI and Raylight ask for: those that all tests have passed with, and those that are here.

A fresh environment takes newer ones each week. Run as a program (`make versions`) it writes down those that are here.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings along there

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "tests" / "versions.txt"
HEAD = """# What all tests have passed with, written by `make versions`: the packages that ComfyUI {comfyui}, Raylight
# and its tests ask for, with Python {python}. To have the same: pip install --constraint tests/versions.txt ...
"""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def asked_for(comfyui: Path) -> list[str]:
    """The names of all packages that ComfyUI, Raylight and its tests ask for themselves."""
    from raylight.dev.setup.environment import EXTRAS, TORCH

    lines = [*TORCH]
    for file in (comfyui / "requirements.txt", ROOT / "requirements.txt"):
        lines += file.read_text("utf-8").splitlines()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    lines += (line for extra in EXTRAS for line in extras[extra])
    return names(lines)


def names(lines: Iterable[str]) -> list[str]:
    """The packages of requirements, each once, in the spelling of package indexes and in order."""
    found = (_NAME.match(line.strip()) for line in lines)
    return sorted({re.sub(r"[-_.]+", "-", match.group()).lower() for match in found if match})


def installed(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def text(packages: Mapping[str, str], comfyui: str) -> str:
    lines = "".join(f"{name}=={version}\n" for name, version in packages.items())
    return HEAD.format(comfyui=comfyui, python=platform.python_version()) + lines


def recorded(content: str) -> dict[str, str]:
    """The versions in the file."""
    return dict(line.split("==") for line in content.splitlines() if not line.startswith("#"))


def differences(tested: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """One line for each package that has not the version that was tested."""
    return [
        f"{name} {here.get(name, 'is not here')}, tested with {tested.get(name, 'none')}"
        for name in sorted({*tested, *here})
        if tested.get(name) != here.get(name)
    ]


def main() -> None:
    sys.path.append(str(ROOT))
    from raylight.dev.setup.comfyui import VARIABLE, ComfyUI

    comfyui = ComfyUI(Path(os.environ[VARIABLE]), "")
    FILE.write_text(text(installed(asked_for(comfyui.root)), comfyui.version), "utf-8")


if __name__ == "__main__":
    main()
