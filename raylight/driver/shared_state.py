"""State that code of node packs inside a model shares with their code around it: a counter of steps that a wrapper
raises and a patch in a block reads, or a result that a patch keeps for a guidance function.

In one process both see one object. When the sampling loop stays in ComfyUI, the code inside is a copy on the workers.
"""

from __future__ import annotations

import dis
import functools
from collections import deque
from collections.abc import Collection, Mapping
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import comfy.model_patcher
import comfy.samplers
from torch import Tensor, nn

from raylight.host.foreign_code import is_foreign_class, is_foreign_function, node_name_of
from raylight.host.patcher_state import DIFFUSION_MODEL, OPTIONS, OVERRIDE

_CODE = ("patches", "patches_replace", OVERRIDE)
_CONTAINERS = (dict, list, set, deque, bytearray)
_MOST = 20_000
_WRITING = {"STORE_SUBSCR", "DELETE_SUBSCR", "STORE_ATTR", "DELETE_ATTR"}
_METHODS = frozenset(
    "add append appendleft clear discard extend insert pop popitem popleft remove setdefault update".split()
)


class _Reach:
    """What code of node packs reaches from some objects: `shared` by `id`, with the code that reaches it, has what it
    may change; `written` are variables that it sets, by the `id` of a cell, or of a module's globals and a name.
    """

    def __init__(self, roots: Collection[Any]) -> None:
        self.shared: dict[Any, tuple[Any, Any]] = {}  # and the object, so that no other gets its id
        self.written: set[Any] = set()
        self._seen: dict[int, Any] = {}
        self._rest: list[tuple[Any, Any]] = [(one, None) for one in roots]
        while self._rest and len(self._seen) < _MOST:
            self._visit(*self._rest.pop())

    def _visit(self, value: Any, owner: Any) -> None:
        if id(value) in self._seen or isinstance(value, (type, ModuleType, Tensor, nn.Module)):
            return
        self._seen[id(value)] = value
        if isinstance(value, FunctionType):
            self._visit_function(value)
        elif isinstance(value, MethodType):
            self._rest += [(value.__func__, owner), (value.__self__, value)]
        elif isinstance(value, functools.partial):
            self._rest += [(one, value.func) for one in (value.func, *value.args, *value.keywords.values())]
        elif isinstance(value, (*_CONTAINERS, tuple, frozenset)):
            if owner is not None and isinstance(value, _CONTAINERS):
                self.shared[id(value)] = owner, value
            if not isinstance(value, bytearray):
                self._rest += [(one, owner) for one in (value.values() if isinstance(value, Mapping) else value)]
        elif isinstance(value, (comfy.model_patcher.ModelPatcher, comfy.samplers.CFGGuider)):
            return
        elif is_foreign_class(type(value)):
            self.shared[id(value)] = owner or value, value
            self._rest += [(one, value) for one in vars(value).values()] if hasattr(value, "__dict__") else []
            self._rest += [(one, value) for one in vars(type(value)).values() if isinstance(one, FunctionType)]
        elif isinstance(value, comfy.samplers.KSAMPLER):
            self._rest += [(one, owner) for one in vars(value).values()]

    def _visit_function(self, function: FunctionType) -> None:
        self._rest += [(function.__wrapped__, function)] if hasattr(function, "__wrapped__") else []
        if not is_foreign_function(function):
            return
        names, stored, _ = _uses(function.__code__)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self.shared[id(cell)] = function, cell
            if name in stored:
                self.written.add(id(cell))
            try:
                self._rest.append((cell.cell_contents, function))
            except ValueError:  # not set yet
                continue
        self._rest += [
            (one, function) for one in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        ]
        space = function.__globals__
        for name in names:
            if name not in space:
                continue
            self.shared[id(space), name] = function, space
            if name in stored:
                self.written.add((id(space), name))
            self._rest.append((space[name], function))


def owner_in_run(
    patcher: comfy.model_patcher.ModelPatcher, guider: Any, call: Mapping[str, Any], wrappers: Collection[Any]
) -> str:
    """Return the name of the node whose code inside the model shares state with code around it in a run of `guider`,
    "" if there is none. `call` has the arguments of ComfyUI's `outer_sample`.
    """
    inside = _code_inside(patcher, guider)
    owner = owner_of_shared(inside, _code_around(patcher, guider, call, wrappers)) if inside else None
    return "" if owner is None else node_name_of(owner)


def owner_of_shared(inside: Collection[Any], outside: Collection[Any]) -> Any:
    """Return a function or object of a node pack among or below `inside` that shares with one of `outside` what one of
    them may change; None if nothing is shared.
    """
    first, second = _Reach(inside), _Reach(outside)
    written = first.written | second.written
    for key, (owner, value) in first.shared.items():
        if key not in second.shared:
            continue
        if isinstance(key, tuple) or isinstance(value, CellType):
            if key in written:
                return owner
        elif _may_change(owner) or _may_change(second.shared[key][0]):
            return owner
    return None


def _may_change(owner: Any) -> bool:
    """Return whether code may change objects that it reaches; a method or an object of a node pack always may."""
    return not isinstance(owner, FunctionType) or _uses(owner.__code__)[2]


def _code_inside(patcher: comfy.model_patcher.ModelPatcher, guider: Any) -> list[Any]:
    """Return what nodes have put into the diffusion model: in its options, and in object patches."""
    options = guider.model_options.get(OPTIONS, {})
    return [
        *(options[name] for name in _CODE if options.get(name)),
        *(value for name, value in patcher.object_patches.items() if name.startswith(DIFFUSION_MODEL)),
    ]


def _code_around(
    patcher: comfy.model_patcher.ModelPatcher, guider: Any, call: Mapping[str, Any], wrappers: Any
) -> list[Any]:
    """Return what runs in ComfyUI's process while the sampling loop stays there: the guider, the sampler, functions of
    guidance, wrappers and callbacks.
    """
    model_options = guider.model_options
    options = model_options.get(OPTIONS, {})
    around = [value for name, value in vars(guider).items() if name not in ("model_patcher", "model_options")]
    around += [guider] if is_foreign_class(type(guider)) else []
    around += [value for name, value in model_options.items() if name != OPTIONS]
    around += [value for name, value in options.items() if name not in _CODE]
    around += [value for name, value in patcher.object_patches.items() if not name.startswith(DIFFUSION_MODEL)]
    return [*around, patcher.callbacks, patcher.wrappers, wrappers, *call.values()]


def names_used(code: CodeType) -> frozenset[str]:
    """Return the names of globals and attributes that code uses, the functions in it included."""
    return _uses(code)[0]


@functools.lru_cache(maxsize=4096)
def _uses(code: CodeType) -> tuple[frozenset[str], frozenset[str], bool]:
    """Return the names of globals that code uses, the variables from outside that it sets, and whether it may change an
    object; the functions in it included.
    """
    names, stored, writes = set(code.co_names), set(), bool(_METHODS & set(code.co_names))
    for one in dis.get_instructions(code):
        if one.opname in ("STORE_DEREF", "DELETE_DEREF", "STORE_GLOBAL", "DELETE_GLOBAL"):
            stored.add(one.argval)
        writes = writes or one.opname in _WRITING
    for const in code.co_consts:
        if isinstance(const, CodeType):
            inner = _uses(const)
            names |= inner[0]
            stored |= inner[1]
            writes = writes or inner[2]
    return frozenset(names), frozenset(stored), writes or bool(stored)
