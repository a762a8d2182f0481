"""Serialize the objects of a run: what workers have themselves is sent as a reference, code of node packs by value.

A run refers to its model in many places: guiders, patches, closures of nodes. A reference to the weightless model of
ComfyUI's process, or to a module or parameter in it, becomes one to the worker's own model.
"""

from __future__ import annotations

import functools
import importlib
import operator
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import comfy.model_management
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import nn

from raylight.cluster.errors import is_out_of_memory
from raylight.cluster.serialization import BY_VALUE, Referrer, SerializedObject, by_value, pack, unpack

from .foreign_code import is_foreign_file, is_foreign_function, node_name_of
from .settings import comfy_root

EXTRAS = "comfy_extras"


class NotSerializableError(ValueError):
    """Something cannot be sent to the workers; the message says what and why."""


@dataclass(frozen=True, slots=True)
class _Reference:
    """What a worker has itself: "patcher", or a "module" or "parameter" by its name in the model ("": the model)."""

    kind: str
    name: str = ""


def serialize(
    value: Any, model: ModelPatcher, foreign_code: bool, also: Referrer | None = None, networks: bool | None = None
) -> SerializedObject:
    """Serialize what a run of `model` needs, for workers that hold its weights.

    With `foreign_code`, code of custom node packs is sent by value, as workers load no packs. With `networks` (by
    default as `foreign_code`) small networks of patches are sent. `also` refers to more objects, as `pack`'s `refer`.

    Raises NotSerializableError: for what cannot be sent, and what must not be.
    """
    references: dict[int, _Reference] = {}

    def refer(item: Any) -> Any:
        if isinstance(item, ModelPatcher):
            if any(item is one for one in ancestry(model)):
                return _Reference("patcher")
            if not (foreign_code if networks is None else networks):
                raise NotSerializableError(f"another model ({type(item.model).__name__}) takes part")
            if isinstance(item.model, BaseModel):
                raise NotSerializableError(f"it holds another diffusion model ({type(item.model).__name__})")
        found = None
        if isinstance(item, (nn.Module, nn.Parameter)):
            if not references:  # made only now: most of what is sent needs none
                references.update(_references_of(model))
            found = references.get(id(item))
            if found is None and isinstance(item, BaseModel):
                raise NotSerializableError(f"it holds another diffusion model ({type(item).__name__})")
        return also(item) if found is None and also is not None else found

    def reduce(item: Any) -> Any:
        return _reduced(item, foreign_code)

    try:
        with by_value(_foreign_modules(len(sys.modules))) if foreign_code else nullcontext():
            return pack(value, refer, reduce)
    except NotSerializableError:
        raise
    except Exception as error:  # of whatever objects nodes have put there
        raise NotSerializableError(f"{type(error).__name__}: {error}") from error


def deserialize(
    content: SerializedObject, patcher: ModelPatcher, also: Callable[[Any], Any] | None = None, copies: bool = True
) -> Any:
    """Return what `serialize` was given, with tensors on this rank's device. `also` resolves what its `also` referred
    to; `copies` is as for `unpack`.

    Raises NotSerializableError: when it cannot be deserialized here.
    """

    def resolve(reference: Any) -> Any:
        if not isinstance(reference, _Reference):
            return also(reference) if also is not None else reference
        return patcher if reference.kind == "patcher" else _resolved(patcher, reference.name)

    try:
        return unpack(content, resolve, patcher.load_device, copies)
    except Exception as error:  # of whatever objects nodes have put there
        if is_out_of_memory(error):
            raise
        raise NotSerializableError(
            f"it could not be unpacked by the workers: {type(error).__name__}: {error}"
        ) from error


def _resolved(patcher: ModelPatcher, name: str) -> Any:
    """Return a module or parameter by its name, without the object patches that an earlier run may have left."""
    for key, before in patcher.object_patches_backup.items():
        if name == key or name.startswith(f"{key}."):
            return operator.attrgetter(name.removeprefix(key).lstrip("."))(before) if name != key else before
    return operator.attrgetter(name)(patcher.model) if name else patcher.model


def is_of_a_pack(kind: type) -> bool:
    """Return whether a class is of a node pack, or of a module that no process can import."""
    module = sys.modules.get(kind.__module__)
    return module is None or _is_foreign(module)


def ancestry(model: ModelPatcher) -> Iterator[ModelPatcher]:
    """Yield the patcher, and those it was cloned from, which earlier nodes may still refer to. One whose weights are on
    workers may be made from another, its `made_from`.
    """
    one: ModelPatcher | None = model
    while one is not None:
        yield one
        one = getattr(one, "made_from", None) or one.parent


def _references_of(model: ModelPatcher) -> dict[int, _Reference]:
    """Return references to all modules and parameters of the model, by the `id` of each."""
    found: dict[int, _Reference] = {}
    patchers = list(ancestry(model))
    for one in patchers:  # of several models, if this one was made from another
        found = _references_in(one.model) | found
    for one in patchers:
        for key, before in one.object_patches_backup.items():
            if isinstance(before, nn.Module):
                # What ComfyUI has put there is not in the worker's model, but what was there before is.
                for module in operator.attrgetter(key)(one.model).modules():
                    found.pop(id(module), None)
                found |= _references_in(before, key)
    return found


def _references_in(base: nn.Module, path: str = "") -> dict[int, _Reference]:
    return {id(module): _Reference("module", name) for name, module in base.named_modules(prefix=path)} | {
        id(parameter): _Reference("parameter", name) for name, parameter in base.named_parameters(prefix=path)
    }


def _reduced(item: Any, foreign_code: bool) -> Any:
    """Return how to send devices, patchers, and code that workers cannot import by its name; as `pack`'s `reduce`."""
    if isinstance(item, torch.device):
        return (torch.device, ("cpu",)) if item.type == "cpu" else (_device_here, ())
    if isinstance(item, ModelPatcher):
        return _patcher_here, (item.model, item.patches)
    if isinstance(item, ModuleType):
        name = _extras_name(item)
        if name is None and type(item) is not ModuleType and sys.modules.get(item.__name__) is item:
            name = item.__name__  # of a class that cloudpickle does not know: `torch.backends`, lazy modules
        return NotImplemented if name is None else (importlib.import_module, (name,))
    if not isinstance(item, (type, FunctionType)):
        return NotImplemented
    if isinstance(item, type) and issubclass(item, io.ComfyNode) and (node := _declared(item)) is not item:
        return _same, (node,)
    module = sys.modules.get(getattr(item, "__module__", None) or "")
    if module is None:
        return NotImplemented
    is_of_pack = _is_foreign(module)
    if is_of_pack or is_foreign_function(item):
        if not foreign_code:
            raise NotSerializableError(f"code of another node pack takes part ({node_name_of(item)})")
        # A function that replaces one of another module bears the name of that one.
        return NotImplemented if is_of_pack else BY_VALUE
    name = _extras_name(module)
    if name is not None and _attribute(module, item.__qualname__) is item:
        return _named, (name, item.__qualname__)
    return NotImplemented


def _declared(node: type) -> type:
    """Return the class that a pack declares, for one that ComfyUI has cloned from it and locked to run it once."""
    return next(
        (
            one
            for one in node.__mro__
            if issubclass(one, io.ComfyNode) and _attribute(sys.modules.get(one.__module__), one.__qualname__) is one
        ),
        node,
    )


def _same(value: Any) -> Any:
    return value


def _named(module: str, qualname: str) -> Any:
    return _attribute(importlib.import_module(module), qualname)


def _attribute(owner: Any, qualname: str) -> Any:
    return functools.reduce(lambda found, name: getattr(found, name, None), qualname.split("."), owner)


def _patcher_here(model: nn.Module, patches: dict[str, Any]) -> ModelPatcher:
    """Return the patcher of a small network of a patch: a copy for this worker."""
    patcher = ModelPatcher(model, _device_here(), comfy.model_management.unet_offload_device())
    patcher.patches = patches
    return patcher


def _device_here() -> torch.device:
    return comfy.model_management.get_torch_device()


def _extras_name(module: ModuleType) -> str | None:
    """Return the importable name of one of ComfyUI's own node modules, which ComfyUI imports under their paths."""
    path = getattr(module, "__file__", None)
    if path is None or Path(path).parent != Path(comfy_root()) / EXTRAS:
        return None
    return f"{EXTRAS}.{Path(path).stem}"


def _is_foreign(module: ModuleType) -> bool:
    path = getattr(module, "__file__", None)
    if path is None:
        return False
    if os.sep in module.__name__:  # ComfyUI names packs by their path, and no process imports such a name
        return _extras_name(module) is None
    return is_foreign_file(path)


@functools.lru_cache(maxsize=1)
def _foreign_modules(_: int) -> list[ModuleType]:
    """Return the modules of node packs; cached by how many modules are imported."""
    return [
        module
        for name, module in list(sys.modules.items())
        if isinstance(module, ModuleType) and module.__name__ == name and _is_foreign(module)
    ]
