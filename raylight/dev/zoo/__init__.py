"""Every diffusion transformer family that ComfyUI knows, at tiny width with random weights: one file per family.

For tests and for drafting plans: real classes from real configurations, small enough for a CPU.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import TYPE_CHECKING

from raylight.driver.preflight import is_older, running

if TYPE_CHECKING:  # it imports ComfyUI, which `python -m raylight.dev.zoo.probe` has to find first
    from .family import Family


@functools.cache
def families() -> dict[str, Family]:
    """Return every family in this folder that the installed ComfyUI can run, by name."""
    return {
        name: family
        for name, family in all_families().items()
        if not (family.since and is_older(running(), family.since))
    }


@functools.cache
def all_families() -> dict[str, Family]:
    """Return every family in this folder, by name."""
    found: dict[str, Family] = {}
    for info in pkgutil.iter_modules(__path__):
        for family in getattr(importlib.import_module(f"{__name__}.{info.name}"), "FAMILIES", ()):
            if family.name in found:
                raise ValueError(f"two families are named {family.name}")
            found[family.name] = family
    return found
