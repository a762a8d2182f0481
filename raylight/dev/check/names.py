"""Every function, class and option of ComfyUI that Raylight's source names: read in the source, so that no list has to
be kept. That it still exists, and that it takes the arguments that it is given.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .seam import GONE, Seam, find

ROOT = Path(__file__).resolve().parents[3]
FOLDERS = ("nodes", "raylight/driver", "raylight/worker", "raylight/host")
OF_COMFYUI = (
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfyui_version",
    "nodes",
    "folder_paths",
    "latent_preview",
    "server",
    "utils",
)
REPLACED = ("replaced", "replaced_on")
"""Functions of `raylight.host.comfy_patches`, which take an object and the name of one of its attributes."""


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of a call: how many by position, which by name, and whether these are all."""

    positional: int
    named: tuple[str, ...]
    complete: bool


@dataclass(frozen=True, slots=True)
class Use:
    """A place in a file of Raylight that names `path` of ComfyUI, and the call there, if it is one."""

    path: str
    file: str
    line: int
    call: Call | None = None


def seams() -> list[Seam]:
    """Return a seam for each name, with all its calls."""
    uses: dict[str, list[Use]] = {}
    purposes = {}
    for file in source_files():
        name = file.relative_to(ROOT).as_posix()
        tree = ast.parse(file.read_text("utf-8"))
        purposes[name] = " ".join((ast.get_docstring(tree) or name).split(". ")[0].split()).rstrip(".")
        for use in uses_in(tree, name):
            uses.setdefault(use.path, []).append(use)
    return [_seam(path, of_path, purposes) for path, of_path in sorted(uses.items())]


def source_files() -> list[Path]:
    """Return the files that may name ComfyUI (tests/test_layers.py)."""
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("**/*.py"))


def _seam(path: str, uses: list[Use], purposes: dict[str, str]) -> Seam:
    first, others = uses[0], sorted({use.file for use in uses[1:]} - {uses[0].file})
    where = f"{first.file}:{first.line}" + (f" and {', '.join(others)}" if others else "")
    stops = f'this does not work: "{purposes[first.file]}"'
    return Seam(path, where, stops, functools.partial(_wrong, path, tuple(uses)))


def _wrong(path: str, uses: tuple[Use, ...]) -> str | None:
    try:
        found = find(path)
    except LookupError:
        return GONE
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # not callable, or without a signature
        return None
    for use in uses:
        call = use.call
        if call is None:
            continue
        bind = signature.bind if call.complete else signature.bind_partial
        try:
            bind(*[None] * call.positional, **dict.fromkeys(call.named))
        except TypeError as error:
            return f"takes other arguments ({use.file}:{use.line}: {error})"
    return None


def uses_in(tree: ast.Module, file: str) -> Iterator[Use]:
    """Yield each place of a file that names something of ComfyUI by a dotted path."""
    names = dict(_imported(tree))
    parts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    calls = {node.func: node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and _is_of_comfyui(node):
            yield from (Use(f"{node.module}.{one.name}", file, node.lineno) for one in node.names)
        elif isinstance(node, (ast.Attribute, ast.Name)) and node not in parts:
            path = _path(node, names)
            if path and path not in OF_COMFYUI:
                yield Use(path, file, node.lineno, _call(calls[node]) if node in calls else None)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in REPLACED:
            owner, attribute = _path(node.args[0], names), node.args[1]
            if owner and isinstance(attribute, ast.Constant):
                yield Use(f"{owner}.{attribute.value}", file, node.lineno)


def _imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield the names that imports of ComfyUI give to a file, each with its dotted path."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for one in node.names:
                if one.name.split(".")[0] in OF_COMFYUI:
                    yield (one.asname, one.name) if one.asname else (one.name.split(".")[0],) * 2
        elif isinstance(node, ast.ImportFrom) and _is_of_comfyui(node):
            yield from ((one.asname or one.name, f"{node.module}.{one.name}") for one in node.names)


def _is_of_comfyui(node: ast.ImportFrom) -> bool:
    return not node.level and (node.module or "").split(".")[0] in OF_COMFYUI


def _path(node: ast.expr, names: dict[str, str]) -> str:
    """Return the dotted path that an expression names, "" if it is none of ComfyUI's."""
    rest: list[str] = []
    while isinstance(node, ast.Attribute):
        rest.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in names:
        return ""
    return ".".join([names[node.id], *reversed(rest)])


def _call(node: ast.Call) -> Call:
    named = tuple(one.arg for one in node.keywords if one.arg is not None)
    spread = any(isinstance(one, ast.Starred) for one in node.args)
    complete = not spread and all(one.arg is not None for one in node.keywords)
    positional = sum(not isinstance(one, ast.Starred) for one in node.args)
    return Call(positional, named, complete)
