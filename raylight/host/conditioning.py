"""Conditioning on its way to workers: everything on the CPU, and nothing that cannot make the journey."""

from __future__ import annotations

from typing import Any

import torch

# Objects that carry models or closures of this process, and what to tell the person about each.
_CANNOT_TRAVEL = {
    "control": "a ControlNet",
    "gligen": "GLIGEN",
    "hooks": "hooks (scheduled LoRA or model weights)",
    "additional_models": "additional models",
}


def portable(conditioning: list[Any], name: str) -> list[Any]:
    """A copy of a CONDITIONING with its tensors on the CPU.

    Raises ValueError, naming the input and what it holds, for what has no way to the workers.
    """
    for _, options in conditioning:
        for key, what in _CANNOT_TRAVEL.items():
            if options.get(key) is not None:
                raise ValueError(f"the {name} conditioning holds {what}, which this node cannot send to its workers")
    return to_cpu(conditioning)


def to_cpu(value: Any) -> Any:
    """A copy of nested lists, tuples, dicts and plain objects with every tensor on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: to_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_cpu(item) for item in value)
    if type(value).__module__ == "comfy.clip_vision":
        copy = type(value)()
        vars(copy).update({key: to_cpu(item) for key, item in vars(value).items()})
        return copy
    return value
