"""ComfyUI's server, where this process has one."""

from __future__ import annotations

import sys
from typing import Any


def prompt_server() -> Any:
    """Return ComfyUI's PromptServer, None in a process without one."""
    # Looked up, not imported: the module exists only where ComfyUI's server runs.
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
