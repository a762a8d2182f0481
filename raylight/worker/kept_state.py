"""What a model keeps from one forward to the next, such as the keys and values of earlier tokens.

A proof repeats a forward, which is only harmless where nothing is kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from raylight.cluster.serialization import as_bytes
from raylight.host.patcher_state import OF_TORCH

# What ComfyUI's layers keep of the weights that they have cast.
_OF_LAYERS = ("torch.", "comfy.ops")
_DEPTH = 4
_LARGE = 2**20  # elements


def kept_by(model: nn.Module) -> dict[str, Any]:
    """Return what a model keeps besides its weights, to be compared: numbers, and the states of tensors."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                found[f"{path}.{name}"] = _state(buffer)
        if any(kind.__module__.startswith(_OF_LAYERS) for kind in type(module).__mro__ if kind is not nn.Module):
            continue
        for name, value in vars(module).items():
            if name not in OF_TORCH:
                found.update(_in(f"{path}.{name}", value, type(module).__module__, _DEPTH))
    return found


def _in(place: str, value: Any, own: str, depth: int) -> Iterator[tuple[str, Any]]:
    """Iterate over numbers and tensors in a value, also in objects whose class is in the Python module `own`."""
    if isinstance(value, Tensor):
        yield place, _state(value)
    elif isinstance(value, (bool, int, float)):
        yield place, value
    elif depth and isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _in(f"{place}[{index}]", item, own, depth - 1)
    elif depth and isinstance(value, dict):
        for name, item in value.items():
            yield from _in(f"{place}[{name!r}]", item, own, depth - 1)
    elif depth and type(value).__module__ == own and not isinstance(value, nn.Module):
        yield from _in(place, getattr(value, "__dict__", {}), own, depth - 1)


def _state(tensor: Tensor) -> Hashable:
    """Return the content of a tensor: models make tables of positions anew that are the same. For a large one, what
    changes when it is replaced or written to.
    """
    if tensor.is_meta or tensor.layout != torch.strided or type(tensor) not in (Tensor, nn.Parameter):
        return id(tensor)
    if tensor.numel() <= _LARGE:
        return tensor.dtype, *tensor.shape, hashlib.sha256(as_bytes(tensor).tobytes()).digest()
    if not tensor.is_inference():
        return id(tensor), tensor._version
    return id(tensor), repr(tensor.sum(dtype=torch.float64).item())  # writes to it are not counted
