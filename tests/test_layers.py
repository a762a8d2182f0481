"""Imports go one way, and each library is imported where it belongs: `docs/architecture.md` has the picture."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What each folder may import of the others. Driver and worker are two processes, and never import each other.
ENGINE = {"host", "cluster", "plans", "parallel", "sharding", "attention"}
MAY_IMPORT = {
    "nodes": {"driver", "host", "attention", "parallel"},
    "driver": ENGINE,
    "worker": ENGINE,
    "host": {"cluster", "parallel", "sharding"},
    "cluster": {"parallel"},
    "plans": {"parallel"},
    "sharding": {"parallel"},
    "parallel": {"attention"},
    "attention": set(),
}
COMFYUI = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "latent_preview", "server"}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("nodes", "raylight")
    for path in (ROOT / folder).rglob("*.py")
    if "dev" not in path.relative_to(ROOT).parts
}


def folder_of(module: str) -> str:
    """The folder that a module of the pack lies in."""
    parts = module.split(".")
    return parts[0] if parts[0] == "nodes" else parts[1] if len(parts) > 1 else ""


def imports(module: str) -> Iterator[str]:
    """All that a file imports, wherever in it, as absolute names."""
    path = FILES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def of_the_pack(name: str) -> str | None:
    """The module of the pack that an imported name is, or lies in."""
    return name if name in FILES else name.rpartition(".")[0] if name.rpartition(".")[0] in FILES else None


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_go_one_way(module: str) -> None:
    folder, imported = folder_of(module), list(imports(module))
    assert not [name for name in imported if name.startswith("raylight.dev")], "what ships imports no developer's tool"
    inner = {folder_of(found) for name in imported if (found := of_the_pack(name)) is not None}
    assert inner - {folder, ""} <= MAY_IMPORT.get(folder, set()), f"{module} reaches up, or into the other process"
    roots = {name.split(".")[0] for name in imported}
    assert folder == "cluster" or "ray" not in roots, "Ray is for raylight/cluster"
    assert folder in ("nodes", "driver", "worker", "host") or not roots & COMFYUI, f"{folder} knows nothing of ComfyUI"


def test_no_circle() -> None:
    graph = {
        module: {found for name in imports(module) if (found := of_the_pack(name)) not in (None, module)}
        for module in FILES
    }
    for module in graph:  # that a package is imported with its modules is no arrow
        graph[module] = {
            name for name in graph[module] if FILES[name].name != "__init__.py" or folder_of(name) == "plans"
        }
    list(TopologicalSorter(graph).static_order())  # raises CycleError, naming the circle


def test_comfyui_is_replaced_in_one_file() -> None:
    """Nothing but `host/comfy_patches.py` sets an attribute of a module or class of ComfyUI's."""
    for module, path in FILES.items():
        tree = ast.parse(path.read_text("utf-8"))
        theirs = {
            (alias.asname or alias.name).split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
            if alias.name.split(".")[0] in COMFYUI
        }
        theirs |= {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in COMFYUI
            for alias in node.names
            if alias.name != "args"
        }
        targets = [
            target
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Attribute)
        ]
        targets += [
            node.args[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("setattr", "delattr")
        ]
        found = [ast.unparse(target) for target in targets if ast.unparse(target).split(".")[0].split("(")[0] in theirs]
        assert not found or module == "raylight.host.comfy_patches", f"{module} changes {found} of ComfyUI's"
