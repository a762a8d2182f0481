"""What tells forwards of a model without a plan apart, and which of them must be computed whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from raylight.host.patcher_state import OPTIONS
from raylight.plans.draft.proof import signature

_SMALLER = 0.3


def kind_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what decides how a forward is split: the `signature` of its arguments, and flags among its options."""
    options = kwargs.get(OPTIONS) or {}
    flags = tuple(sorted((str(name), value) for name, value in options.items() if isinstance(value, bool)))
    return signature(args), signature({name: kwargs[name] for name in kwargs if name != OPTIONS}), flags


def code_inside(name: str, kwargs: Mapping[str, Any]) -> str:
    """Return why a forward of model `name` must not be split, "" if it may: code of nodes in it may need all tokens, or
    keep state that repeated forwards would change.
    """
    options = kwargs.get(OPTIONS) or {}
    if any(options.get("patches", {}).values()) or any(options.get("patches_replace", {}).values()):
        return f"a node has put patches between the blocks of {name}, which has no plan"
    if any(options.get("wrappers", {}).get("diffusion_model", {}).values()):
        return f"a node has put code around the forward of {name}, which has no plan"
    return ""


def another(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return arguments of another forward of the same kind: the latents mirrored, at a much earlier timestep.

    ComfyUI passes both by position.
    """
    return tuple(change(value) for change, value in zip((_mirrored, _earlier), args, strict=False)) + args[2:]


def _mirrored(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_mirrored(item) for item in value)
    return value.flip(-1) if isinstance(value, Tensor) and value.ndim else value


def _earlier(value: Any) -> Any:
    return value * _SMALLER if isinstance(value, Tensor) and value.is_floating_point() else value


def copied(value: Any) -> Any:
    """Copy containers and tensors of an argument, which a forward may change in place."""
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) is dict:
        return {name: copied(item) for name, item in value.items()}
    return type(value)(copied(item) for item in value) if type(value) in (list, tuple) else value
