"""Tests of what only the newest tested ComfyUI has: all models, and the nodes and frontend that templates are for."""

from __future__ import annotations

import pytest

from raylight.dev.setup.comfyui import DEFAULT_VERSION
from raylight.driver.preflight import is_older, running

of_the_newest = pytest.mark.skipif(
    is_older(running(), DEFAULT_VERSION), reason=f"this is about what ComfyUI {DEFAULT_VERSION} has"
)
