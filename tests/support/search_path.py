"""The environment of a Python process that finds more modules."""

from __future__ import annotations

import os
from collections.abc import Iterable


def search_path(folders: Iterable[str]) -> str:
    """Return a PYTHONPATH of some folders, and then of those that this process was started with: they may have the
    packages of another release of ComfyUI.
    """
    return os.pathsep.join(filter(None, (*folders, os.environ.get("PYTHONPATH"))))
