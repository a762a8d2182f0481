"""Weights that are tensors made of tensors, such as quantised data with its scales: taken apart to be split by rows,
and put together again, after they were gathered, each time they are used.

Nothing here knows a quantisation: parts are stored rows, and gathering rows gives back the very bytes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# Of all 8-bit parts: not every version of FSDP2 takes integers. Bytes are only ever copied.
HELD_AS = torch.float8_e4m3fn

_RECIPES = "_packed_weights"


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How a weight is put together: its class, that class's context, and the parts with their dtypes."""

    kind: type
    context: Any
    parts: dict[str, torch.dtype]


def take_apart(model: nn.Module) -> None:
    """Replace each parameter that is made of tensors by its parts, as parameters of the same module.

    The part `p` of a parameter `w` becomes a parameter `w_p`; 8-bit parts are held as `HELD_AS`. `w` itself turns into
    an attribute that puts the parts together, which fails while they are split.
    """
    for module in list(model.modules()):
        packed = {name: parameter for name, parameter in module.named_parameters(recurse=False)
                  if is_traceable_wrapper_subclass(parameter.data)}
        if not packed:
            continue
        recipes = {}
        for name, parameter in packed.items():
            value = parameter.data
            inner, context = value.__tensor_flatten__()
            parts = {part: getattr(value, part) for part in inner}
            recipes[name] = _Recipe(type(value), context, {key: part.dtype for key, part in parts.items()})
            delattr(module, name)
            for key, held in parts_as_held(value).items():
                module.register_parameter(_attribute(name, key), nn.Parameter(held, requires_grad=False))
        setattr(module, _RECIPES, recipes)
        module.__class__ = _assembling(type(module), tuple(packed))


def packed_weights(module: nn.Module) -> tuple[str, ...]:
    """The names of the parameters of this module itself that `take_apart` took apart."""
    return tuple(getattr(module, _RECIPES, ()))


def parts_of(module: nn.Module, name: str) -> dict[str, str]:
    """The parts of such a parameter: their names in its class, and the attributes that hold them."""
    return {part: _attribute(name, part) for part in getattr(module, _RECIPES)[name].parts}


def parts_as_held(value: Tensor) -> dict[str, Tensor]:
    """The parts of a tensor that is made of tensors, 8-bit ones as `HELD_AS`."""
    parts = {part: getattr(value, part).detach() for part in value.__tensor_flatten__()[0]}
    return {name: part.view(HELD_AS) if part.dtype.itemsize == 1 else part for name, part in parts.items()}


def put_together(module: nn.Module, name: str, parts: dict[str, Tensor]) -> Tensor:
    """The parameter made of these parts, which are as the attributes of `parts_of` hold them, but whole."""
    recipe = getattr(module, _RECIPES)[name]
    typed = {key: part.view(recipe.parts[key]) if part.dtype != recipe.parts[key] else part.detach()
             for key, part in parts.items()}
    return recipe.kind.__tensor_unflatten__(typed, recipe.context, None, None)


def _attribute(name: str, part: str) -> str:
    return f"{name}_{part.lstrip('_')}"


def _assemble(name: str, module: nn.Module) -> Tensor:
    parts = {part: getattr(module, attribute) for part, attribute in parts_of(module, name).items()}
    if any(isinstance(part, DTensor) for part in parts.values()):
        raise RuntimeError(f"the weight '{name}' of a {type(module).__name__} is split over the ranks and was used "
                           f"outside of the forward of its block")
    return put_together(module, name, parts)


def _state_dict(module: nn.Module, *_: Any, destination: dict[str, Any] | None = None, prefix: str = "",
                **__: Any) -> dict[str, Any]:
    # Names of weights as they were, for whoever looks for them; values are parts, which no one can load.
    found = {} if destination is None else destination
    of_parts = {attribute for name in packed_weights(module) for attribute in parts_of(module, name).values()}
    for name in packed_weights(module):
        found[f"{prefix}{name}"] = getattr(module, next(iter(parts_of(module, name).values())))
    for name, parameter in module.named_parameters(recurse=False):
        if name not in of_parts:
            found[f"{prefix}{name}"] = parameter
    return found


@functools.cache
def _assembling(kind: type, names: tuple[str, ...]) -> type:
    properties = {name: property(functools.partial(_assemble, name)) for name in names}
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "state_dict": _state_dict, **properties})
