"""What can go from ComfyUI's process to the workers, and what stands there for what cannot.

A run refers to its model in many places: guiders, patches, closures of nodes. Wherever the weightless model of this
process appears, in whole or in part, the worker's own takes its place.
"""

from __future__ import annotations

import functools
import importlib
import operator
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

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
    """Something has no way to the workers; the message says what and why."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of the model, by its name in it: the model itself (""), a module, or a parameter."""

    kind: str
    name: str = ""


def serialize(
    value: Any, model: ModelPatcher, foreign_code: bool, also: Referrer | None = None, networks: bool | None = None
) -> SerializedObject:
    """Pack what a run of `model` needs, for workers that hold the weights of it.

    `foreign_code` tells whether code of custom node packs may go along, by value, as workers load no packs; `networks`
    whether small networks of patches may, by default where code may.
    `also` names further parts as `pack`'s `refer` does. Raises NotSerializableError.
    """
    parts: dict[int, _Part] = {}

    def refer(part: Any) -> Any:
        if isinstance(part, ModelPatcher):
            if any(part is one for one in ancestry(model)):
                return _Part("patcher")
            if not (foreign_code if networks is None else networks):
                raise NotSerializableError(f"another model ({type(part.model).__name__}) takes part")
            if isinstance(part.model, BaseModel):
                raise NotSerializableError(f"it holds another diffusion model ({type(part.model).__name__})")
        found = None
        if isinstance(part, (nn.Module, nn.Parameter)):
            if not parts:  # looked for only now: most of what is sent has none
                parts.update(_parts_of_all(model))
            found = parts.get(id(part))
        return also(part) if found is None and also is not None else found

    def reduce(part: Any) -> Any:
        return _reduced(part, foreign_code)

    try:
        with by_value(_foreign_modules()) if foreign_code else _nothing():
            return pack(value, refer, reduce)
    except NotSerializableError:
        raise
    except Exception as error:  # of whatever objects people's nodes put there
        raise NotSerializableError(f"{type(error).__name__}: {error}") from error


def deserialize(
    parcel: SerializedObject, patcher: ModelPatcher, also: Callable[[Any], Any] | None = None, copies: bool = True
) -> Any:
    """Unpack what `serialize` packed, on this rank's device; `also` resolves what its `also` named, and `copies`
    is as for `unpack`. Raises NotSerializableError."""

    def resolve(reference: Any) -> Any:
        if not isinstance(reference, _Part):
            return also(reference) if also is not None else reference
        if reference.kind == "patcher":
            return patcher
        return _part(patcher, reference.name)

    try:
        return unpack(parcel, resolve, patcher.load_device, copies)
    except Exception as error:  # of whatever objects people's nodes put there
        if is_out_of_memory(error):
            raise
        raise NotSerializableError(
            f"it could not be unpacked by the workers: {type(error).__name__}: {error}"
        ) from error


def _part(patcher: ModelPatcher, name: str) -> Any:
    """A module or a parameter by its name, as it is without the object patches that an earlier run may have left."""
    for key, before in patcher.object_patches_backup.items():
        if name == key or name.startswith(f"{key}."):
            return operator.attrgetter(name.removeprefix(key).lstrip("."))(before) if name != key else before
    return operator.attrgetter(name)(patcher.model) if name else patcher.model


def is_of_a_pack(kind: type) -> bool:
    """Whether a class is of a node pack, or of a module that no process can import."""
    module = sys.modules.get(kind.__module__)
    return module is None or _is_foreign(module)


def ancestry(model: ModelPatcher) -> Iterator[ModelPatcher]:
    """The patcher, and those it was cloned from, which nodes before may still refer to."""
    one: ModelPatcher | None = model
    while one is not None:
        yield one
        one = one.parent


def _parts_of_all(model: ModelPatcher) -> dict[int, _Part]:
    found: dict[int, _Part] = {}
    patchers = list(ancestry(model))
    for one in patchers:  # of several models where this one was taken over from another
        found = _parts(one.model) | found
    for one in patchers:
        for key, before in one.object_patches_backup.items():
            if isinstance(before, nn.Module):
                # What ComfyUI has put there is no part of the worker's model, but what was there before is.
                for module in operator.attrgetter(key)(one.model).modules():
                    found.pop(id(module), None)
                found |= _parts(before, key)
    return found


def _parts(base: nn.Module, path: str = "") -> dict[int, _Part]:
    parts = {id(module): _Part("module", name) for name, module in base.named_modules(prefix=path)}
    parts |= {id(parameter): _Part("parameter", name) for name, parameter in base.named_parameters(prefix=path)}
    return parts


def _reduced(part: Any, foreign_code: bool) -> Any:
    """How a worker gets code that has no importable name here, and devices."""
    if isinstance(part, torch.device):
        return (torch.device, ("cpu",)) if part.type == "cpu" else (_device_here, ())
    if isinstance(part, ModelPatcher):
        return _patcher_here, (part.model, part.patches)
    if isinstance(part, ModuleType):
        name = _extras_name(part)
        return NotImplemented if name is None else (importlib.import_module, (name,))
    if not isinstance(part, (type, FunctionType)):
        return NotImplemented
    if isinstance(part, type) and issubclass(part, io.ComfyNode) and (node := _declared(part)) is not part:
        return _same, (node,)
    module = sys.modules.get(getattr(part, "__module__", None) or "")
    if module is None:
        return NotImplemented
    if is_foreign_function(part) and not _is_foreign(module):  # it bears the name of what it takes the place of
        if not foreign_code:
            raise NotSerializableError(f"code of another node pack takes part ({node_name_of(part)})")
        return BY_VALUE
    if not foreign_code and _is_foreign(module):
        raise NotSerializableError(f"code of another node pack takes part ({node_name_of(part)})")
    name = _extras_name(module)
    if name is not None and _attribute(module, part.__qualname__) is part:
        return _named, (name, part.__qualname__)
    return NotImplemented


def _declared(node: type) -> type:
    """The class that a pack declares, of one that ComfyUI has cloned from it and locked to run it once."""
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
    for name in qualname.split("."):
        owner = getattr(owner, name, None)
    return owner


def _patcher_here(model: nn.Module, patches: dict[str, Any]) -> ModelPatcher:
    """The patcher of a small network that takes part in a patch: a copy for this worker."""
    import comfy.model_management

    patcher = ModelPatcher(model, _device_here(), comfy.model_management.unet_offload_device())
    patcher.patches = patches
    return patcher


def _device_here() -> torch.device:
    import comfy.model_management

    return comfy.model_management.get_torch_device()


def _extras_name(module: ModuleType) -> str | None:
    """The importable name of one of ComfyUI's own node modules, which ComfyUI imports under their paths."""
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


def _foreign_modules() -> list[ModuleType]:
    return _foreign_among(len(sys.modules))


@functools.lru_cache(maxsize=1)
def _foreign_among(_: int) -> list[ModuleType]:
    """Looked for anew only when modules were imported since."""
    return [
        module
        for name, module in list(sys.modules.items())
        if isinstance(module, ModuleType) and module.__name__ == name and _is_foreign(module)
    ]


@contextmanager
def _nothing() -> Iterator[None]:
    yield
