"""Code of node packs: what they have replaced in ComfyUI, and which node a piece of code is of."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from .patcher_state import Change
from .prompt_server import prompt_server
from .settings import PACK_ROOT, comfy_root

# The Python modules of the sampling loop, as opposed to models.
_LOOP = (
    "comfy.sample",
    "comfy.samplers",
    "comfy.sampler_helpers",
    "comfy.k_diffusion.sampling",
    "comfy.extra_samplers.uni_pc",
    "comfy.model_base",
    "comfy.model_sampling",
    "comfy.conds",
    "comfy.hooks",
    "comfy.context_windows",
)
_OF_MODELS = ("comfy.ldm.", "comfy.ops.", "comfy.rmsnorm.")
_WRAPPINGS = 8


def replaced_in(classes: Iterable[type]) -> Iterator[Change]:
    """Yield the functions of packs in these classes of ComfyUI's models, in their bases, and in the Python modules that
    define them and that they call.

    Raises ValueError: when a pack has replaced one of these classes, as workers build the model with ComfyUI's.
    """
    for owner in _with_bases(tuple(classes)):
        yield from (Change(owner, name, value) for name, value in _replaced_in_class(owner))
    for module in _called_by(tuple(classes)):
        for name, value in list(vars(sys.modules[module]).items()):
            if isinstance(value, type) and value in classes and is_foreign_class(value) and name in _names_of(module):
                raise ValueError(
                    f"{module}.{name}, of which it is built, was replaced by {value.__qualname__} of the "
                    f"node pack {pack_of(sys.modules[value.__module__].__file__ or '')}"
                )
        yield from (Change(f"python:{module}", name, value) for name, value in _replaced_in_module(sys.modules[module]))


def replaced_in_loop() -> list[Change]:
    """Return the functions of packs in ComfyUI's sampling loop."""
    found = []
    for name in _LOOP:
        module = sys.modules.get(name)
        if module is None:
            continue
        found += [Change(f"python:{name}", key, value) for key, value in _replaced_in_module(module)]
        kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == name]
        found += [Change(kind, key, value) for kind in kinds for key, value in _replaced_in_class(kind)]
    return found


def is_foreign_function(value: Any) -> bool:
    """Return whether it is a function written in a node pack other than this one."""
    function = _function(value)
    return function is not None and is_foreign_file(function.__code__.co_filename)


def is_foreign(value: Any) -> bool:
    """Return whether it is a callable of a node pack other than this one: a function, also as a property, method or
    partial, or an object of a class that was written there.
    """
    for _ in range(_WRAPPINGS):
        if isinstance(value, property):
            value = value.fget
        elif isinstance(value, functools.partial):
            value = value.func
        elif isinstance(value, (MethodType, staticmethod, classmethod)):
            value = value.__func__
        elif isinstance(value, FunctionType) and hasattr(value, "_torchdynamo_orig_callable"):
            value = value._torchdynamo_orig_callable
        else:
            break
    if isinstance(value, FunctionType):
        return is_foreign_file(value.__code__.co_filename)
    return callable(value) and not isinstance(value, (type, ModuleType)) and is_foreign_class(type(value))


def is_foreign_class(kind: type) -> bool:
    """Return whether a class was written in a node pack other than this one."""
    path = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return isinstance(path, str) and is_foreign_file(path)


def is_comfys(value: Any) -> bool:
    """Return whether it is a function or method of ComfyUI's own."""
    function = value.__func__ if isinstance(value, MethodType) else value
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename.startswith(os.path.join(comfy_root(), "comfy") + os.sep)


@functools.lru_cache(maxsize=4096)
def is_foreign_file(path: str) -> bool:
    """Return whether a file belongs to a node pack other than this one."""
    return pack_of(path) is not None


@functools.lru_cache(maxsize=4096)
def pack_of(path: str) -> str | None:
    """Return the name of the node pack, other than this one, to which a file belongs; None if there is none."""
    import folder_paths

    real = os.path.realpath(path)
    if real.startswith(str(PACK_ROOT) + os.sep):
        return None
    for folder in folder_paths.get_folder_paths("custom_nodes"):
        root = os.path.abspath(folder) + os.sep
        for one in (real, os.path.abspath(path)):
            if one.startswith(root):
                return one.removeprefix(root).split(os.sep)[0].removesuffix(".py")
    return None


def _replaced_in_module(module: ModuleType) -> list[tuple[str, Any]]:
    own = _names_of(module.__name__)
    return [(name, value) for name, value in list(vars(module).items()) if is_foreign(value) and name in own]


def _replaced_in_class(kind: type) -> list[tuple[str, Any]]:
    own = _names_of(kind.__module__)
    inherited = kind.__mro__[1:]
    return [
        (name, value)
        for name, value in list(vars(kind).items())
        if is_foreign(value) and (name in own or any(name in vars(base) for base in inherited))
    ]


@functools.lru_cache(maxsize=256)
def _names_of(module: str) -> frozenset[str]:
    """Return all names that the source of a Python module uses: ComfyUI's code does not call others, which packs add
    (samplers above all).
    """
    source = Path(sys.modules[module].__file__ or "")
    names: set[str] = set()
    codes = [compile(source.read_bytes(), str(source), "exec", dont_inherit=True)]
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes += [const for const in code.co_consts if isinstance(const, CodeType)]
    return frozenset(names)


def _function(value: Any) -> FunctionType | None:
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    return value if isinstance(value, FunctionType) else None


@functools.lru_cache(maxsize=64)
def _with_bases(classes: tuple[type, ...]) -> tuple[type, ...]:
    return tuple({base: None for kind in classes for base in kind.__mro__ if base.__module__.startswith("comfy.")})


@functools.lru_cache(maxsize=64)
def _called_by(classes: tuple[type, ...]) -> tuple[str, ...]:
    """Return the Python modules of ComfyUI's models that define these classes, and those that they use, directly or
    not.
    """
    own = {kind.__module__: None for kind in _with_bases(classes) if _is_of_models(kind.__module__)}
    rest = list(own)
    while rest:
        for value in list(vars(sys.modules[rest.pop()]).values()):
            of = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if (
                isinstance(value, (FunctionType, ModuleType))
                and isinstance(of, str)
                and _is_of_models(of)
                and (of not in own and of in sys.modules)
            ):
                own[of] = None
                rest.append(of)
    return tuple(own)


def _is_of_models(module: str) -> bool:
    return f"{module}.".startswith(_OF_MODELS)


_NAMED = 5


def node_name_of(code: Any) -> str:
    """Return which node made this function or object, for a message.

    Of several nodes of a pack, name those in the running prompt; if there is none, the pack.
    """
    if isinstance(code, functools.partial):
        return node_name_of(code.func)
    code = code if isinstance(code, (type, FunctionType)) else getattr(code, "__func__", type(code))
    if isinstance(code, functools.partial):  # bound, as a method
        return node_name_of(code.func)
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
    path = (
        code.__code__.co_filename
        if isinstance(code, FunctionType)
        else getattr(sys.modules.get(getattr(code, "__module__", None) or ""), "__file__", None)
    )
    return pack_of(path) if isinstance(path, str) else None


def _all_nodes() -> dict[str, type]:
    return getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})


def _display_name(node_id: str) -> str:
    return getattr(sys.modules.get("nodes"), "NODE_DISPLAY_NAME_MAPPINGS", {}).get(node_id) or node_id


def _running() -> frozenset[str]:
    """Return the kinds of nodes in the prompts that ComfyUI runs now; empty if this is no server."""
    server = prompt_server()
    items = getattr(getattr(server, "prompt_queue", None), "currently_running", {})
    return frozenset(node.get("class_type", "") for item in list(items.values()) for node in item[2].values())
