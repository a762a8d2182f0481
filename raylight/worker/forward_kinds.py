"""What tells forwards of a model without a plan apart, and which of them must be computed whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from raylight.host.patcher_state import OPTIONS
from raylight.plans.draft.proof import signature

_SMALLER = 0.3
# Of all values. Changes by one unit in the last place of so many are as much, on average, as rounding all of them anew.
_NUDGED = 0.125


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


def changed(args: tuple[Any, ...], other: bool, nudged: bool) -> tuple[Any, ...]:
    """Return the arguments of another forward of the same kind, or `args` themselves. If `other`, with the latents
    mirrored, at a much earlier timestep. If `nudged`, with the last bit of one value of eight of the latents changed,
    so that a model in 16 bits rounds anew everywhere, and does nothing else.

    ComfyUI passes both by position.
    """
    if other:
        args = tuple(change(value) for change, value in zip((_mirrored, _earlier), args, strict=False)) + args[2:]
    return (_nudged(args[0]), *args[1:]) if nudged and args else args


def _nudged(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_nudged(item) for item in value)
    if not (isinstance(value, Tensor) and value.is_floating_point() and value.itemsize == 2):
        return value
    chance = torch.Generator().manual_seed(0)  # the same on all ranks
    bits = (torch.rand(value.shape, generator=chance, device=chance.device) < _NUDGED).to(value.device, torch.int16)
    return (value.contiguous().view(torch.int16) ^ bits).view(value.dtype)


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
