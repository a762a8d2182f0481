"""The way from a node to the engine, taken when a node runs and not when ComfyUI starts."""

from __future__ import annotations

from types import ModuleType

from raylight.host import start


def driver() -> ModuleType:
    """`raylight.host.driver`. Raises RuntimeError, saying what to install, where a package is missing."""
    try:
        # Not at module scope: Ray and torch.distributed would slow every start of ComfyUI.
        from raylight.host import driver
    except ModuleNotFoundError as error:
        if error.name not in start.REQUIRED:
            raise
        raise RuntimeError(start.advice([error.name])) from error
    return driver
