"""This checkout, loaded as a node pack into the ComfyUI of this process."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import nodes as comfy_nodes

ROOT = Path(__file__).resolve().parents[2]


def load() -> dict[str, Any]:
    """Load the pack and return ComfyUI's node classes by id."""
    assert asyncio.run(comfy_nodes.load_custom_node(str(ROOT)))
    return comfy_nodes.NODE_CLASS_MAPPINGS


def load_beside_stock_nodes() -> dict[str, Any]:
    """Load ComfyUI's own nodes, too."""
    asyncio.run(comfy_nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
    return load()
