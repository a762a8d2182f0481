"""What a node has decided, written on the node itself."""

from __future__ import annotations

import sys

from comfy_api.latest import io, ui


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
