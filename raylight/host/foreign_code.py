"""Code of node packs in the place of ComfyUI's own: functions of its classes and Python modules that were replaced."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterable, Iterator
from types import FunctionType
from typing import Any

from .changes import Change
from .settings import PACK_ROOT

# What runs a sampling loop, as opposed to a model.
_LOOP = ("comfy.sample", "comfy.samplers", "comfy.sampler_helpers", "comfy.k_diffusion.sampling",
         "comfy.extra_samplers.uni_pc", "comfy.model_base", "comfy.model_sampling", "comfy.conds", "comfy.hooks",
         "comfy.context_windows")


def replaced_in(classes: Iterable[type]) -> Iterator[Change]:
    """Functions of packs in these classes of ComfyUI's models and their bases, and in the Python modules that define
    them and that they call."""
    for owner in _with_bases(tuple(classes)):
        yield from ((Change(owner, name, value)) for name, value in _foreign_functions(vars(owner)))
    for module in _called_by(tuple(classes)):
        yield from (Change(f"python:{module}", name, value)
                    for name, value in _foreign_functions(vars(sys.modules[module])))


def replaced_in_loop() -> list[Change]:
    """Functions of packs in ComfyUI's sampling."""
    found = []
    for name in _LOOP:
        module = sys.modules.get(name)
        if module is None:
            continue
        found += [Change(f"python:{name}", key, value) for key, value in _foreign_functions(vars(module))]
        for kind in vars(module).values():
            if isinstance(kind, type) and kind.__module__ == name:
                found += [Change(kind, key, value) for key, value in _foreign_functions(vars(kind))]
    return found


def is_foreign_function(value: Any) -> bool:
    """Whether it was written in a node pack other than this one."""
    function = _function(value)
    return function is not None and is_foreign_file(function.__code__.co_filename)


@functools.lru_cache(maxsize=4096)
def is_foreign_file(path: str) -> bool:
    """Whether a file belongs to a node pack other than this one."""
    import folder_paths

    real = os.path.realpath(path)
    if real.startswith(str(PACK_ROOT) + os.sep):
        return False
    return any(_within(one, folder) for one in (real, path) for folder in folder_paths.get_folder_paths("custom_nodes"))


def _within(path: str, folder: str) -> bool:
    return os.path.abspath(path).startswith(os.path.abspath(folder) + os.sep)


def _foreign_functions(names: Any) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in list(names.items()) if is_foreign_function(value)]


def _function(value: Any) -> FunctionType | None:
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    return value if isinstance(value, FunctionType) else None


@functools.lru_cache(maxsize=64)
def _with_bases(classes: tuple[type, ...]) -> tuple[type, ...]:
    return tuple({base: None for kind in classes for base in kind.__mro__ if base.__module__.startswith("comfy.")})


@functools.lru_cache(maxsize=64)
def _called_by(classes: tuple[type, ...]) -> tuple[str, ...]:
    """The Python modules of ComfyUI's models that define these classes, and those whose functions they import."""
    own = {kind.__module__: None for kind in _with_bases(classes) if kind.__module__.startswith("comfy.ldm.")}
    for name in list(own):
        for value in vars(sys.modules[name]).values():
            of = getattr(value, "__module__", None)
            if isinstance(value, FunctionType) and isinstance(of, str) and of.startswith("comfy.ldm."):
                own[of] = None
    return tuple(name for name in own if name in sys.modules)
