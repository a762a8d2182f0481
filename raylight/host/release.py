"""Which releases of ComfyUI Raylight works with. Imports nothing of ComfyUI, so that set-up can ask too."""

from __future__ import annotations

import re

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
