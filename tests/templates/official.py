"""The workflow templates in ComfyUI's requirements, converted to prompts by its own frontend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chromium import Page

from raylight.dev.demo.comfy_server import ComfyServer
from raylight.dev.demo.graphs import Graph

_READY = (
    "window.app?.extensionManager && window.app?.graph && Object.keys(window.LiteGraph?.registered_node_types"
    " ?? {}).length > 100"
)
# Nobody answers the frontend's dialogs about missing models and the like, so it must not wait for them.
_CONVERT = """
(async () => {
  await window.app.loadGraphData(%s, true, false, null, {silentAssetErrors: true, showMissingModelsDialog: false,
                                                         showMissingNodesDialog: false});
  return (await window.app.graphToPrompt()).output;
})()
"""


def names() -> list[str]:
    """Return the names of all templates."""
    from comfyui_workflow_templates import iter_templates

    return sorted(entry.template_id for entry in iter_templates())


def workflow(name: str) -> dict[str, Any]:
    """Return a template as a user opens it. Raises LookupError: there is none of that name."""
    from comfyui_workflow_templates import get_asset_path

    try:
        path = get_asset_path(name, f"{name}.json")
    except KeyError as error:
        raise LookupError(f"the templates that this ComfyUI installs have none named {name}") from error
    return json.loads(Path(path).read_text("utf-8"))


class Frontend:
    """ComfyUI's frontend in a page, served by a running ComfyUI."""

    def __init__(self, server: ComfyServer, page: Page) -> None:
        self._page = page
        page.open(f"http://127.0.0.1:{server.port}/")
        page.wait_for(_READY)

    def prompt(self, content: dict[str, Any]) -> Graph:
        """Return what "Run" would send."""
        graph = self._page.evaluate(_CONVERT % json.dumps(content), timeout=120)
        if not graph:  # it opens its own first workflow some time after its start, which may interfere
            graph = self._page.evaluate(_CONVERT % json.dumps(content), timeout=120)
        if not graph:
            raise ValueError("ComfyUI's frontend made nothing of this workflow")
        # A node that this ComfyUI lacks has no class.
        return {
            node: {"class_type": entry.get("class_type", "unknown"), "inputs": entry["inputs"]}
            for node, entry in graph.items()
        }
