"""Tests of what only the newest tested ComfyUI has: the nodes and the frontend that the templates are made for."""

from __future__ import annotations

import pytest
from comfyui_version import __version__

RELEASE = (0, 30)

of_the_newest = pytest.mark.skipif(
    tuple(int(part) for part in __version__.split(".")[:2]) < RELEASE,
    reason=f"templates are made for the nodes and the frontend of ComfyUI {'.'.join(map(str, RELEASE))}")
