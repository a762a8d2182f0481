"""A model as it was when it was built, and what nodes have changed on it since: methods, attributes, classes, hooks and
weights.

ComfyUI's patches lie on the patcher and are not meant here. Node packs also change the model itself, and the models of
the workers would never notice.
"""

from __future__ import annotations

import functools
import operator
import os
import weakref
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from comfy.model_base import BaseModel
from torch import Tensor, nn

from raylight.host.foreign_code import replaced_in
from raylight.host.patcher_state import HOOKS, OF_LOADING, OF_TORCH, SIMPLE, Change

from .mappings import are_written

INNER = "diffusion_model"
_FUNCTIONS = (FunctionType, MethodType, BuiltinFunctionType, functools.partial)
_NOTHING = object()


@dataclass(frozen=True, slots=True)
class _Kept:
    """One module as it was."""

    module: nn.Module
    kind: type
    attributes: Mapping[str, Any]
    hooks: frozenset[int]

    @classmethod
    def of(cls, module: nn.Module) -> _Kept:
        attributes = {name: value for name, value in vars(module).items() if name not in OF_TORCH}
        return cls(module, type(module), attributes, frozenset(key for kind in HOOKS for key in vars(module)[kind]))


class Baseline:
    """A model before nodes have it, to compare with what it is later."""

    def __init__(self, base: BaseModel) -> None:
        self._kind = type(base)
        self._kept = {path: _Kept.of(module) for path, module in _parts(base)}
        self._weights = {
            name: (weight, _place(weight), _version(weight), weight.shape)
            for name, weight in base.diffusion_model.named_parameters()
        }
        self._classes = tuple({kept.kind: None for kept in self._kept.values()})
        # By the model: its modules when it was seen first, as others of the same class may take their places.
        self._first: weakref.WeakKeyDictionary[BaseModel, dict[str, nn.Module]] = weakref.WeakKeyDictionary(
            {base: {path: kept.module for path, kept in self._kept.items()}}
        )
        # By the model that was compared: its state then, the patches that were left out, and what differed.
        self._seen: weakref.WeakKeyDictionary[BaseModel, tuple[list[Any], frozenset[str], list[Change]]] = (
            weakref.WeakKeyDictionary()
        )

    def changes(self, base: BaseModel, patched: Collection[str] = ()) -> list[Change]:
        """What differs on `base`, which is the model that this was taken of, or another one of the same file.

        `patched` are the names of object patches, which ComfyUI may have put there, and which are not meant. Raises
        ValueError, naming it, for a part that was put in the place of another, added or taken out.
        """
        state, patched = _state(base), frozenset(patched)
        seen = self._seen.get(base)
        if (
            seen is None
            or seen[1] != patched
            or len(seen[0]) != len(state)
            or not all(map(operator.is_, seen[0], state))
        ):
            found = [change for change in self._compared(base, patched) if change.place not in patched]
            seen = self._seen[base] = state, patched, found
        return [*seen[2], *replaced_in(self._classes)]

    @property
    def diffusion_model(self) -> type[nn.Module]:
        """The class that the diffusion model had."""
        return self._kept[INNER].kind

    def is_changed(self, base: BaseModel) -> bool:
        """Whether nodes have changed the very model that this was taken of; object patches are no change."""
        try:
            return bool(
                list(self._compared(base, frozenset()))
                or self.changed_weights(base)
                or are_written(weight for weight, *_ in self._weights.values() if not weight.is_meta)
            )
        except ValueError:
            return True

    def changed_weights(self, base: BaseModel) -> list[str]:
        """Names of weights that were replaced or written to, of the model that this was taken of."""
        now = dict(base.diffusion_model.named_parameters())
        return [
            name
            for name, (weight, place, version, _) in self._weights.items()
            if now.get(name) is not weight or _version(weight) != version or _place(weight) != place
        ]

    def shape(self, weight: str) -> tuple[int, ...]:
        """The shape that a weight had."""
        return self._weights[weight][3]

    def _compared(self, base: BaseModel, patched: frozenset[str]) -> Iterator[Change]:
        if type(base) is not self._kind:
            yield Change("", "__class__", type(base))
        for name, value in vars(base).items():
            if isinstance(value, _FUNCTIONS) and _is_method(base, name) and not _is_its_own(base, name, value):
                yield Change("", name, value)
        now = dict(_parts(base))
        first = self._first.setdefault(base, {})
        for path, kept in self._kept.items():
            module = now.pop(path, None)
            if _is_within(path, patched):
                continue
            if module is None:
                raise ValueError(f"{path} was taken out of the model")
            # Of a list only what is in it matters.
            if first.setdefault(path, module) is not module and not isinstance(module, nn.ModuleList):
                raise ValueError(f"{path} was replaced by another ({type(module).__qualname__})")
            yield from _differences(path, kept, module)
        for path in now:
            if not _is_within(path, patched):
                raise ValueError(f"{path} was added to the model")


def _differences(path: str, kept: _Kept, module: nn.Module) -> Iterator[Change]:
    is_same = module is kept.module
    if type(module) is not kept.kind and (is_same or not _is_made_alike(type(module), kept.kind)):
        if not is_same and not issubclass(type(module), kept.kind):
            raise ValueError(f"{path} was replaced by another ({type(module).__qualname__})")
        yield Change(path, "__class__", type(module))
    attributes = vars(module)
    for name, value in attributes.items():
        if name not in OF_TORCH and not _is_its_own(module, name, value):
            before = kept.attributes.get(name, _NOTHING)
            if before is not value and (is_same or _differs(before, name, value, _is_method(module, name))):
                yield Change(path, name, value)
    for kind in HOOKS:
        takes_kwargs = attributes[f"{kind}_with_kwargs"]
        for key, hook in attributes[kind].items():
            if not is_same or key not in kept.hooks:
                yield Change(path, kind, hook, key in takes_kwargs)


def _is_made_alike(kind: type, other: type) -> bool:
    """Whether classes of two models are the same code: ComfyUI makes those of quantised layers anew for each model, and
    a GGUF pack is imported once for ComfyUI and once for Raylight, which gives its layers a class of their own."""
    if other.__module__.startswith("raylight."):
        other = other.__bases__[0]
    return kind.__qualname__ == other.__qualname__ and _file(kind) is not None and _file(kind) == _file(other)


def _file(kind: type) -> str | None:
    """Where the code of a class is; its module may not be among those that Python knows."""
    code = next((value.__code__ for value in vars(kind).values() if isinstance(value, FunctionType)), None)
    return None if code is None else os.path.realpath(code.co_filename)


def _differs(before: Any, name: str, value: Any, is_method: bool) -> bool:
    """Whether an attribute of another model of the same file is not what it was when that was built."""
    if is_method:  # put before a method of the class
        return True
    if name.startswith(OF_LOADING):
        return False
    if before is _NOTHING:
        return isinstance(value, (*_FUNCTIONS, *SIMPLE))
    if isinstance(value, _FUNCTIONS):
        return type(before) is not type(value) or _name(before) != _name(value)
    return isinstance(value, SIMPLE) and (type(before) is not type(value) or before != value)


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", "")


def _parts(base: BaseModel) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the diffusion model by their path from `base`; of a compiled one what it was compiled of."""
    for name, module in base.diffusion_model.named_modules():
        if "_orig_mod" not in module._modules:
            yield f"{INNER}.{name}".rstrip(".").replace("._orig_mod", ""), module


def _state(base: BaseModel) -> list[Any]:
    """Objects of which another one is there after a change."""
    found: list[Any] = [type(base), *(value for value in vars(base).values() if isinstance(value, _FUNCTIONS))]
    for _, module in _parts(base):
        found += [module, type(module)]
        for name, value in vars(module).items():
            if name not in OF_TORCH:
                found.append(value)
            elif name in HOOKS:
                found += value.values()
    return found


def _is_method(owner: Any, name: str) -> bool:
    return callable(getattr(type(owner), name, None))


def _is_its_own(owner: Any, name: str, value: Any) -> bool:
    """Whether it is the class's method all the same, as ComfyUI leaves it where it has taken an object patch back."""
    return (
        isinstance(value, MethodType) and value.__self__ is owner and value.__func__ is getattr(type(owner), name, None)
    )


def _is_within(path: str, patched: frozenset[str]) -> bool:
    """Whether a patch has put another module there, or at a module that holds it."""
    return bool(patched) and any(path == one or path.startswith(f"{one}.") for one in patched)


def _version(weight: Tensor) -> int:
    return -1 if weight.is_inference() else weight._version


def _place(weight: Tensor) -> int:
    return 0 if weight.is_meta else weight.data_ptr()
