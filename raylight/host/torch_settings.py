"""PyTorch's settings of a process that change numbers: read in ComfyUI's process, where nodes may have changed them,
and set in the workers for each job.
"""

from __future__ import annotations

import operator
from contextlib import suppress
from typing import Any

import torch

Settings = tuple[tuple[str, Any], ...]

_NAMES = (
    "cuda.matmul.allow_fp16_accumulation",
    "cuda.matmul.allow_tf32",
    "cuda.matmul.allow_fp16_reduced_precision_reduction",
    "cuda.matmul.allow_bf16_reduced_precision_reduction",
    "cudnn.allow_tf32",
    "cudnn.enabled",
    "cudnn.benchmark",
    "cudnn.deterministic",
)


def read() -> Settings:
    """Return the settings of this process, as far as this PyTorch has them, by their names in `torch.backends`."""
    return tuple((name, value) for name in _NAMES if (value := _value(name)) is not None)


def apply(settings: Settings) -> bool:
    """Set in this process what differs. Return whether anything did."""
    differing = [(name, value) for name, value in settings if _value(name) not in (None, value)]
    for name, value in differing:
        owner, _, attribute = name.rpartition(".")
        setattr(operator.attrgetter(owner)(torch.backends), attribute, value)
    return bool(differing)


def _value(name: str) -> Any:
    # AttributeError: another version. RuntimeError: set by both of two interfaces of PyTorch, which it then rejects.
    with suppress(AttributeError, RuntimeError):
        return operator.attrgetter(name)(torch.backends)
    return None
