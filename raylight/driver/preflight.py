"""Checks at the start of ComfyUI: its release, and whether the packages that Raylight needs are installed.

Imports nothing of ComfyUI but its version, so that the set-up can ask too. One line in ComfyUI's log for each problem.
The nodes are registered all the same, so that a workflow opens; they report it again when they run.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import sys
from pathlib import Path

MINIMUM = "0.24.0"
"""The oldest release that the tests run on; `requires-comfyui` in pyproject.toml says the same to the registry."""


def is_older(version: str, than: str = MINIMUM) -> bool:
    """Whether a version is older than another; one without numbers ("unknown") is not."""
    numbers = _numbers(version)
    return bool(numbers) and numbers < _numbers(than)


def running() -> str:
    """The version of the ComfyUI in whose process this is, "" where it does not say."""
    try:
        from comfyui_version import __version__
    except ImportError:
        return ""
    return __version__


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


logger = logging.getLogger(__name__)

REQUIRED = ("ray", "safetensors")
_REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements.txt"


def log_problems() -> None:
    """Log what is wrong, if anything. Imports none of the packages."""
    version = running()
    if is_older(version):
        logger.warning(
            "Raylight is made for ComfyUI %s or later, and this is %s: update ComfyUI if its nodes do not work",
            MINIMUM,
            version,
        )
    absent = [name for name in REQUIRED if not _is_there(name)]
    if absent:
        logger.warning("%s", advice(absent))


def advice(absent: list[str]) -> str:
    """What to do about packages that are not there."""
    which = f"package {absent[0]}" if len(absent) == 1 else f"packages {' and '.join(absent)}"
    return (
        f"Raylight needs the Python {which}, and its nodes cannot run without: run "
        f'"{sys.executable}" -m pip install -r "{_REQUIREMENTS}" and restart ComfyUI'
    )


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False
