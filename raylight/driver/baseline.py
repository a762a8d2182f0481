"""A model as it was built, to find what nodes have changed on it since: methods, attributes, classes, hooks, weights.

This is not about ComfyUI's patches, which are on the patcher. Some node packs change the model object itself, which the
models on the workers would not see.
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

from .beside_model import INNER, BesideModel

_FUNCTIONS = (FunctionType, MethodType, BuiltinFunctionType, functools.partial)
# What PyTorch's layers compute with, though it looks like what is set when they are loaded.
_OF_LAYERS = ("_reversed_padding_repeated_twice",)
_MISSING = object()


@dataclass(frozen=True, slots=True)
class ModuleState:
    """A module as it was, to compare it with later, or another of the same weights. `hooks` are the keys of its forward
    hooks.
    """

    module: nn.Module
    kind: type
    attributes: Mapping[str, Any]
    hooks: frozenset[int]

    @classmethod
    def of(cls, module: nn.Module) -> ModuleState:
        attributes = {name: value for name, value in vars(module).items() if name not in OF_TORCH}
        return cls(module, type(module), attributes, frozenset(key for kind in HOOKS for key in vars(module)[kind]))


class Baseline:
    """A model before nodes change it, to compare later states with."""

    def __init__(self, base: BaseModel) -> None:
        self.beside = BesideModel(base)
        self._kind = type(base)
        self._kept = {path: ModuleState.of(module) for path, module in _modules(base)}
        self._weights = {
            name: (weight, _stamp(weight), weight.shape) for name, weight in base.diffusion_model.named_parameters()
        }
        self._classes = tuple({kept.kind: None for kept in self._kept.values()})
        # By model: its modules when it was first compared, as others of the same class may replace them.
        self._first: weakref.WeakKeyDictionary[BaseModel, dict[str, nn.Module]] = weakref.WeakKeyDictionary(
            {base: {path: kept.module for path, kept in self._kept.items()}}
        )
        # By model: its state when it was last compared, the patches that were ignored then, and the changes found.
        self._seen: weakref.WeakKeyDictionary[BaseModel, tuple[list[Any], frozenset[str], list[Change]]] = (
            weakref.WeakKeyDictionary()
        )

    def changes(self, base: BaseModel, patched: Collection[str] = ()) -> list[Change]:
        """Return what differs on `base`: the model of this baseline, or another model of the same file.

        `patched` are the names of object patches that ComfyUI may have applied, which are ignored. Raises ValueError,
        naming it, for a module that was replaced, added or removed.
        """
        state, patched = _state(base), frozenset(patched)
        before, ignored, found = self._seen.get(base, ([], None, []))
        if ignored != patched or len(before) != len(state) or not all(map(operator.is_, before, state)):
            found = [change for change in self._compared(base, patched) if change.place not in patched]
            self._seen[base] = state, patched, found
        return [*found, *replaced_in(self._classes)]

    @property
    def diffusion_model(self) -> type[nn.Module]:
        """The class that the diffusion model was built as."""
        return self._kept[INNER].kind

    def changed_weights(self, base: BaseModel) -> list[str]:
        """Return the names of weights that were replaced or written to, of the model of this baseline."""
        now = dict(base.diffusion_model.named_parameters())
        return [
            name
            for name, (weight, stamp, _) in self._weights.items()
            if now.get(name) is not weight or _stamp(weight) != stamp
        ]

    def shape(self, weight: str) -> tuple[int, ...]:
        """Return the shape that a weight had."""
        return self._weights[weight][2]

    def _compared(self, base: BaseModel, patched: frozenset[str]) -> Iterator[Change]:
        if type(base) is not self._kind:
            yield Change("", "__class__", type(base))
        for name, value in vars(base).items():
            if isinstance(value, _FUNCTIONS) and _is_method(base, name) and not _is_its_own(base, name, value):
                yield Change("", name, value)
        now = dict(_modules(base))
        first = self._first.setdefault(base, {})
        for path, kept in self._kept.items():
            module = now.pop(path, None)
            if _is_within(path, patched):
                continue
            if module is None:
                raise ValueError(f"{path} was removed from the model")
            # A list may be another one as long as its items are the same.
            if first.setdefault(path, module) is not module and not isinstance(module, nn.ModuleList):
                raise ValueError(f"{path} was replaced by another ({type(module).__qualname__})")
            yield from differences(path, kept, module)
        for path in now:
            if not _is_within(path, patched):
                raise ValueError(f"{path} was added to the model")


def differences(path: str, kept: ModuleState, module: nn.Module) -> Iterator[Change]:
    """Yield what differs on a module at `path` from what was kept of it, or of one that was built of the same weights.

    Raises ValueError: it is of another class.
    """
    is_same = module is kept.module
    if type(module) is not kept.kind and (is_same or not _is_made_alike(type(module), kept.kind)):
        if not is_same and not issubclass(type(module), kept.kind):
            raise ValueError(f"{path} was replaced by another ({type(module).__qualname__})")
        yield Change(path, "__class__", type(module))
    attributes = vars(module)
    for name, value in attributes.items():
        if name not in OF_TORCH and not _is_its_own(module, name, value):
            before = kept.attributes.get(name, _MISSING)
            if before is not value and (is_same or _differs(before, name, value, _is_method(module, name))):
                yield Change(path, name, value)
    for kind in HOOKS:
        takes_kwargs = attributes[f"{kind}_with_kwargs"]
        for key, hook in attributes[kind].items():
            if not is_same or key not in kept.hooks:
                yield Change(path, kind, hook, key in takes_kwargs)


def _is_made_alike(kind: type, other: type) -> bool:
    """Return whether classes of two models have the same code: ComfyUI creates those of quantised layers for each
    model, and a GGUF pack is imported once for ComfyUI and once for Raylight, which derives its own class of layer.
    """
    if other.__module__.startswith("raylight."):
        other = other.__bases__[0]
    if kind.__qualname__ != other.__qualname__ or _file(kind) != _file(other):
        return False
    # A class without code of its own is one that ComfyUI makes of another and some arguments.
    return _file(kind) is not None or kind.__bases__ == other.__bases__


def _file(kind: type) -> str | None:
    """Return the file of a class's code, whose module may not be in `sys.modules`."""
    code = next((value.__code__ for value in vars(kind).values() if isinstance(value, FunctionType)), None)
    return None if code is None else os.path.realpath(code.co_filename)


def _differs(before: Any, name: str, value: Any, is_method: bool) -> bool:
    """Return whether an attribute of another model of the same file differs from the baseline's."""
    if is_method:  # set in the place of a method of the class
        return True
    if name.startswith(OF_LOADING) and name not in _OF_LAYERS:
        return False
    if before is _MISSING:
        return isinstance(value, (*_FUNCTIONS, *SIMPLE))
    if isinstance(value, _FUNCTIONS):
        return type(before) is not type(value) or _name(before) != _name(value)
    return _is_plain(value) and (type(before) is not type(value) or before != value)


def _is_plain(value: Any) -> bool:
    """Return whether it is a number, a text, or a list of such, as the padding of a convolution is."""
    return isinstance(value, SIMPLE) or (isinstance(value, (tuple, list)) and all(map(_is_plain, value)))


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", "")


def _modules(base: BaseModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of the diffusion model with their path from `base`; of a compiled module the original."""
    for name, module in base.diffusion_model.named_modules():
        if "_orig_mod" not in module._modules:
            yield f"{INNER}.{name}".rstrip(".").replace("._orig_mod", ""), module


def _state(base: BaseModel) -> list[Any]:
    """Return the objects of which at least one is another after a change."""
    found: list[Any] = [type(base), *(value for value in vars(base).values() if isinstance(value, _FUNCTIONS))]
    for _, module in _modules(base):
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
    """Return whether an attribute is just the class's method, which ComfyUI leaves when it undoes an object patch."""
    return (
        isinstance(value, MethodType) and value.__self__ is owner and value.__func__ is getattr(type(owner), name, None)
    )


def _is_within(path: str, patched: frozenset[str]) -> bool:
    """Return whether a patch replaces the module at `path` or one that contains it."""
    return any(path == one or path.startswith(f"{one}.") for one in patched)


def _stamp(weight: Tensor) -> tuple[int, int]:
    """Return a weight's address and PyTorch's count of writes to it, as far as it has them."""
    return 0 if weight.is_meta else weight.data_ptr(), -1 if weight.is_inference() else weight._version
