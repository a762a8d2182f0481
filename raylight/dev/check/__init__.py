"""Whether a ComfyUI has all that Raylight stands on, told in plain sentences in under a minute: `make check`.

`seam` says what one such seam is; each other module here lists the seams of one kind.
"""

from __future__ import annotations

from .seam import Seam


def all_seams() -> list[Seam]:
    """Return every seam. Imports ComfyUI, which has to be on Python's path."""
    from . import attention, loading, models, names, nodes, objects, sampling

    return [seam for module in (names, objects, attention, sampling, loading, models, nodes) for seam in module.seams()]
