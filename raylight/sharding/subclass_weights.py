"""Weights that are tensor subclasses, such as quantised data with its scales: flattened to be sharded by rows, and
rebuilt each time that they are used, after their components were gathered.

Nothing here knows a quantisation: components are stored rows, and gathering rows gives back the same bytes.
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

# The dtype in which 8-bit components are stored: not every parameter can be of integers. Bytes are only copied.
STORED_AS = torch.float8_e4m3fn

_FLATTENED = "_flattened_weights"

# The plain tensors that a weight consists of, by their attributes in its class.
Components = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Flattened:
    """A tensor as its components, and the function that rebuilds it from such components."""

    components: Components
    rebuild: Callable[[Components], Tensor]


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How to rebuild a weight, and the dtypes of its components."""

    rebuild: Callable[[Components], Tensor]
    dtypes: dict[str, torch.dtype]


def flatten_tensor(tensor: Tensor) -> Flattened | None:
    """Return the components of a tensor subclass that PyTorch knows to wrap tensors; None for any other tensor."""
    value = tensor.data
    if not is_traceable_wrapper_subclass(value):
        return None
    names, context = value.__tensor_flatten__()
    kind: Any = type(value)

    def rebuild(components: Components) -> Tensor:
        return kind.__tensor_unflatten__(components, context, None, None)

    return Flattened({name: getattr(value, name) for name in names}, rebuild)


def flatten_weights(model: nn.Module, flatten: Callable[[Tensor], Flattened | None] = flatten_tensor) -> None:
    """Replace each parameter of `model` that `flatten` knows by its components, as parameters of the same module.

    The component `c` of a parameter `w` becomes a parameter `w_c`; 8-bit ones are stored as `STORED_AS`. `w` itself
    turns into a property that rebuilds the weight.

    Reading `w` raises RuntimeError: while its components are sharded.
    """
    for module in list(model.modules()):
        flat = {name: flatten(parameter) for name, parameter in module.named_parameters(recurse=False)}
        flat = {name: value for name, value in flat.items() if value is not None}
        if not flat:
            continue
        recipes = {}
        for name, value in flat.items():
            recipes[name] = _Recipe(value.rebuild, {key: one.dtype for key, one in value.components.items()})
            delattr(module, name)
            for key, stored in _as_stored(value.components).items():
                module.register_parameter(_attribute(name, key), nn.Parameter(stored, requires_grad=False))
        setattr(module, _FLATTENED, recipes)
        module.__class__ = _with_properties(type(module), tuple(flat))


def flattened_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters of this module itself that `flatten_weights` replaced."""
    return tuple(getattr(module, _FLATTENED, ()))


def component_attributes(module: nn.Module, name: str) -> dict[str, str]:
    """Return the components of a flattened parameter: their names, and the attributes of `module` that store them."""
    return {key: _attribute(name, key) for key in getattr(module, _FLATTENED)[name].dtypes}


def stored_components(tensor: Tensor) -> Components:
    """Return the components of a tensor subclass, 8-bit ones as `STORED_AS`."""
    flat = flatten_tensor(tensor)
    assert flat is not None
    return _as_stored(flat.components)


def rebuild_weight(module: nn.Module, name: str, components: Components) -> Tensor:
    """Return a flattened parameter from its full components, which have the dtypes in which `module` stores them."""
    recipe = getattr(module, _FLATTENED)[name]
    return recipe.rebuild(
        {
            key: value.view(recipe.dtypes[key]) if value.dtype != recipe.dtypes[key] else value.detach()
            for key, value in components.items()
        }
    )


def rebuilder_of(module: nn.Module, name: str) -> Callable[[Components], Tensor]:
    """Return the function that rebuilds a flattened parameter, as `flatten` gave it."""
    return getattr(module, _FLATTENED)[name].rebuild


def _as_stored(components: Components) -> Components:
    return {
        name: value.detach().view(STORED_AS) if value.dtype.itemsize == 1 else value.detach()
        for name, value in components.items()
    }


def _attribute(name: str, component: str) -> str:
    return f"{name}_{component.lstrip('_')}"


def _rebuilt(name: str, module: nn.Module) -> Tensor:
    components = {key: getattr(module, attribute) for key, attribute in component_attributes(module, name).items()}
    if any(isinstance(value, DTensor) for value in components.values()):
        raise RuntimeError(
            f"the weight '{name}' of a {type(module).__name__} is sharded over the ranks and was used outside of the "
            f"forward of its block"
        )
    return rebuild_weight(module, name, components)


def _state_dict(
    module: nn.Module, *_: Any, destination: dict[str, Any] | None = None, prefix: str = "", **__: Any
) -> dict[str, Any]:
    # The original names of weights, for code that looks for them; values are components, which no one can load.
    found = {} if destination is None else destination
    attributes = {name: list(component_attributes(module, name).values()) for name in flattened_names(module)}
    found |= {f"{prefix}{name}": getattr(module, of_name[0]) for name, of_name in attributes.items()}
    for name, parameter in module.named_parameters(recurse=False):
        if not any(name in of_name for of_name in attributes.values()):
            found[f"{prefix}{name}"] = parameter
    return found


@functools.cache
def _with_properties(kind: type, names: tuple[str, ...]) -> type:
    properties = {name: property(functools.partial(_rebuilt, name)) for name in names}
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "state_dict": _state_dict, **properties})
