"""What all nodes use: the link types of saved workflows, the way to the engine, and text on a node."""

from __future__ import annotations

import sys
from types import ModuleType

from comfy_api.latest import io, ui

from raylight.driver import preflight

CATEGORY = "Raylight"

RayActorsInit = io.Custom("RAY_ACTORS_INIT")
RayActors = io.Custom("RAY_ACTORS")
RayLora = io.Custom("RAY_LORA")


def driver() -> ModuleType:
    """`raylight.driver.api`. Raises RuntimeError, saying what to install, where a package is missing."""
    try:
        # Not at module scope: Ray and torch.distributed would slow every start of ComfyUI.
        from raylight.driver import api
    except ModuleNotFoundError as error:
        if error.name not in preflight.REQUIRED:
            raise
        raise RuntimeError(preflight.advice([error.name])) from error
    return api


def show(node: type[io.ComfyNode], text: str) -> ui.PreviewText:
    """Write `text` on the running node; the result is the node's `ui`, for the history of the prompt.

    The node's schema has to ask for `io.Hidden.unique_id`.
    """
    # ComfyUI's module of that name, where a server runs; it is not for others to import first.
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    unique_id = None if node.hidden is None else node.hidden.unique_id
    if server is not None and unique_id is not None:
        server.send_progress_text(text, unique_id)
    return ui.PreviewText(text)
