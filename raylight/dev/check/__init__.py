"""Whether a ComfyUI has all that Raylight stands on, told in plain sentences in under a minute: `make check`.

`seam` says what one such seam is; each other module here lists the seams of one kind.
"""

from __future__ import annotations

import importlib
from contextlib import suppress

from .seam import Seam


def all_seams() -> list[Seam]:
    """Return every seam. Imports ComfyUI, which has to be on Python's path."""
    with suppress(ImportError):  # told as a seam that is gone
        # First, as ComfyUI's start does: `nodes` of 0.24 puts another module of this name before it on Python's path.
        importlib.import_module("utils.extra_config")
    from . import attention, loading, models, names, nodes, objects, sampling

    return [seam for module in (names, objects, attention, sampling, loading, models, nodes) for seam in module.seams()]
