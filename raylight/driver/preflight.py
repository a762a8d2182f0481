"""Checks at the start of ComfyUI: its release, and whether the packages that Raylight needs are installed.

Imports nothing of ComfyUI but its version, so that the set-up can use it too. Each problem is one line in ComfyUI's
log. The nodes are registered all the same, so that workflows open; they report the problem again when they run.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import sys
from pathlib import Path

logger = logging.getLogger(__name__)

MINIMUM = "0.24.0"
"""The oldest release that the tests run on; `requires-comfyui` in pyproject.toml says the same to the registry."""


def is_older(version: str, than: str = MINIMUM) -> bool:
    """Return whether a version is older than another; one without numbers ("unknown") is not."""
    numbers = _numbers(version)
    return bool(numbers) and numbers < _numbers(than)


def running() -> str:
    """Return the version of the ComfyUI in this process, "" if it has none."""
    try:
        from comfyui_version import __version__
    except ImportError:
        return ""
    return __version__


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


REQUIRED = ("ray", "safetensors")
_REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements.txt"


def log_problems() -> None:
    """Log a warning for each problem. Imports none of the packages."""
    version = running()
    if is_older(version):
        logger.warning(
            "Raylight is made for ComfyUI %s or later, and this is %s: update ComfyUI if its nodes do not work",
            MINIMUM,
            version,
        )
    missing = [name for name in REQUIRED if not _is_installed(name)]
    if missing:
        logger.warning("%s", advice(missing))


def advice(missing: list[str]) -> str:
    """Say how to install packages that are missing."""
    which = f"package {missing[0]}" if len(missing) == 1 else f"packages {' and '.join(missing)}"
    return (
        f"Raylight needs the Python {which}, and its nodes cannot run without it: run "
        f'"{sys.executable}" -m pip install -r "{_REQUIREMENTS}" and restart ComfyUI'
    )


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False
