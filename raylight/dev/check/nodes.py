"""Raylight's nodes in ComfyUI's list, and the nodes of ComfyUI that they call."""

from __future__ import annotations

import asyncio
import functools
import importlib
import sys
from typing import Any

from .names import ROOT
from .seam import Seam


def seams() -> list[Seam]:
    """Return the seams of the node pack."""
    return [
        Seam("loading this pack", "__init__.py", "there are no Raylight nodes in ComfyUI", _loads),
        Seam("the schemas of nodes", "nodes/__init__.py", "some nodes are not in ComfyUI's menu", _schemas),
        Seam(
            "ComfyUI's own nodes",
            "nodes/derived.py",
            "some nodes of saved workflows for Raylight are missing",
            _stock_nodes,
        ),
    ]


@functools.cache
def ours() -> dict[str, Any]:
    """Load ComfyUI's nodes and then this pack, as ComfyUI does when it starts. Return the pack's nodes by id."""
    nodes: Any = importlib.import_module("nodes")
    asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
    if not asyncio.run(nodes.load_custom_node(str(ROOT))):
        raise RuntimeError("ComfyUI's log says why")
    pack = f"custom_nodes.{ROOT.name}"
    found = nodes.NODE_CLASS_MAPPINGS.items()
    return {name: node for name, node in found if getattr(node, "RELATIVE_PYTHON_MODULE", None) == pack}


def _loads() -> str | None:
    return None if ours() else "adds no nodes"


def _schemas() -> str | None:
    for name, node in ours().items():
        schema = node.GET_SCHEMA()
        if schema.node_id != name or not node.INPUT_TYPES():
            return f"are not as they were: {name} has no inputs or another name"
    return None


def _stock_nodes() -> str | None:
    derived = next(module for name, module in sys.modules.items() if name.endswith(".nodes.derived"))
    missing = [twin.stock for twin in derived.TWINS if twin.node_id not in ours()]
    return f"do not include {', '.join(missing)}" if missing else None
