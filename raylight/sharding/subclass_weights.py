"""Weights that are tensors made of tensors, such as quantised data with its scales: taken apart to be split by rows,
and put together again, after they were gathered, each time they are used.

Nothing here knows a quantisation: parts are stored rows, and gathering rows gives back the very bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# Of all 8-bit parts: not every version of FSDP2 takes integers. Bytes are only ever copied.
HELD_AS = torch.float8_e4m3fn

_RECIPES = "_packed_weights"


Parts = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A tensor that was taken apart: its parts by name, and what makes such a tensor of such parts."""

    parts: Parts
    together: Callable[[Parts], Tensor]


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How a weight is put together, and the parts with their dtypes."""

    together: Callable[[Parts], Tensor]
    parts: dict[str, torch.dtype]


def flattened(parameter: Tensor) -> Unpacked | None:
    """The parts of a tensor that PyTorch knows to be made of tensors; None for any other."""
    value = parameter.data
    if not is_traceable_wrapper_subclass(value):
        return None
    inner, context = value.__tensor_flatten__()
    return Unpacked({part: getattr(value, part) for part in inner}, functools.partial(_unflatten, type(value), context))


def flatten(model: nn.Module, unpack: Callable[[Tensor], Unpacked | None] = flattened) -> None:
    """Replace each parameter that `unpack` knows by its parts, as parameters of the same module.

    The part `p` of a parameter `w` becomes a parameter `w_p`; 8-bit parts are held as `HELD_AS`. `w` itself turns into
    an attribute that puts the parts together, which fails while they are split.
    """
    for module in list(model.modules()):
        unpacked = {name: unpack(parameter) for name, parameter in module.named_parameters(recurse=False)}
        packed = {name: value for name, value in unpacked.items() if value is not None}
        if not packed:
            continue
        recipes = {}
        for name, value in packed.items():
            recipes[name] = _Recipe(value.together, {part: tensor.dtype for part, tensor in value.parts.items()})
            delattr(module, name)
            for part, held in _as_held(value.parts).items():
                module.register_parameter(_attribute(name, part), nn.Parameter(held, requires_grad=False))
        setattr(module, _RECIPES, recipes)
        module.__class__ = _assembling(type(module), tuple(packed))


def packed_weights(module: nn.Module) -> tuple[str, ...]:
    """The names of the parameters of this module itself that `flatten` took apart."""
    return tuple(getattr(module, _RECIPES, ()))


def parts_of(module: nn.Module, name: str) -> dict[str, str]:
    """The parts of such a parameter: their names in its class, and the attributes that hold them."""
    return {part: _attribute(name, part) for part in getattr(module, _RECIPES)[name].parts}


def parts_as_held(value: Tensor) -> Parts:
    """The parts of a tensor that is made of tensors, 8-bit ones as `HELD_AS`."""
    unpacked = flattened(value)
    assert unpacked is not None
    return _as_held(unpacked.parts)


def unflatten(module: nn.Module, name: str, parts: Parts) -> Tensor:
    """The parameter made of these parts, which are as the attributes of `parts_of` hold them, but whole."""
    recipe = getattr(module, _RECIPES)[name]
    return recipe.together(
        {
            key: part.view(recipe.parts[key]) if part.dtype != recipe.parts[key] else part.detach()
            for key, part in parts.items()
        }
    )


def maker_of(module: nn.Module, name: str) -> Callable[[Parts], Tensor]:
    """What puts such a parameter together, as `unpack` gave it."""
    return getattr(module, _RECIPES)[name].together


def _as_held(parts: Parts) -> Parts:
    return {
        name: part.detach().view(HELD_AS) if part.dtype.itemsize == 1 else part.detach() for name, part in parts.items()
    }


def _unflatten(kind: type, context: Any, parts: Parts) -> Tensor:
    return kind.__tensor_unflatten__(parts, context, None, None)


def _attribute(name: str, part: str) -> str:
    return f"{name}_{part.lstrip('_')}"


def _assemble(name: str, module: nn.Module) -> Tensor:
    parts = {part: getattr(module, attribute) for part, attribute in parts_of(module, name).items()}
    if any(isinstance(part, DTensor) for part in parts.values()):
        raise RuntimeError(
            f"the weight '{name}' of a {type(module).__name__} is split over the ranks and was used "
            f"outside of the forward of its block"
        )
    return unflatten(module, name, parts)


def _state_dict(
    module: nn.Module, *_: Any, destination: dict[str, Any] | None = None, prefix: str = "", **__: Any
) -> dict[str, Any]:
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
