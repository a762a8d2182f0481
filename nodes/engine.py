"""The way from a node to the engine, taken when a node runs and not when ComfyUI starts."""

from __future__ import annotations

from types import ModuleType


def driver() -> ModuleType:
    """`raylight.host.driver`. Raises RuntimeError, saying what to install, where Ray is missing."""
    try:
        # Not at module scope: Ray and torch.distributed would slow every start of ComfyUI.
        from raylight.host import driver
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise RuntimeError(
            "Raylight needs the Python package ray: in ComfyUI's Python environment, run "
            "`pip install -r requirements.txt` in Raylight's folder, and restart ComfyUI"
        ) from error
    return driver
