"""Which node has made a piece of code, for messages to the person at the graph."""

from __future__ import annotations

import functools
import sys
from types import FunctionType
from typing import Any

from .foreign_code import pack_of

_NAMED = 5


def origin(code: Any) -> str:
    """Which node made this function or object.

    Of a pack's several nodes those that are in the prompt that runs; the pack itself where that does not tell either.
    """
    if isinstance(code, functools.partial):
        return origin(code.func)
    code = code if isinstance(code, (type, FunctionType)) else getattr(code, "__func__", type(code))
    if isinstance(code, functools.partial):  # bound, as a method
        return origin(code.func)
    module, qualname = getattr(code, "__module__", "?"), getattr(code, "__qualname__", "?")
    pack = _pack_of(code)
    of_module, of_pack = {}, {}
    for node_id, node in _all_nodes().items():
        if node.__module__ == module:
            of_module[node_id] = node
        if pack is not None and _pack_of(node) == pack:
            of_pack[node_id] = node
    own = next((one for one, node in of_module.items() if node.__qualname__ == qualname.split(".")[0]), None)
    if own is not None:
        return f"the node {_display_name(own)}"
    running = _running()
    for nodes in (of_module, of_pack):
        names = sorted({_display_name(one) for one in nodes if one in running})
        if len(names) == 1:
            return f"the node {names[0]}"
        if names:
            return f"one of the nodes {', '.join(names)}"
    if pack is not None:
        return f"the node pack {pack} ({qualname})"
    names = sorted({_display_name(one) for one in of_module})
    if 0 < len(names) <= _NAMED:
        return f"one of the nodes {', '.join(names)}"
    return f"{module}.{qualname}"


def _pack_of(code: Any) -> str | None:
    path = code.__code__.co_filename if isinstance(code, FunctionType) else getattr(
        sys.modules.get(getattr(code, "__module__", None) or ""), "__file__", None)
    return pack_of(path) if isinstance(path, str) else None


def _all_nodes() -> dict[str, type]:
    return getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})


def _display_name(node_id: str) -> str:
    return getattr(sys.modules.get("nodes"), "NODE_DISPLAY_NAME_MAPPINGS", {}).get(node_id) or node_id


def _running() -> frozenset[str]:
    """The kinds of nodes in the prompts that ComfyUI runs now; of none where this is no server."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    items = getattr(getattr(server, "prompt_queue", None), "currently_running", {})
    kinds = set()
    for item in list(items.values()):
        kinds |= {node.get("class_type", "") for node in item[2].values()}
    return frozenset(kinds)
