"""Tensors put in the place of a module's parameters and buffers."""

from __future__ import annotations

from torch import Tensor, nn


def set_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """Let `value` be the parameter (an `nn.Parameter`) or buffer `name`, a dotted path in `model`."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, value)


def set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Let `value` be the parameter `name` of `model`, without a gradient. Any shape and dtype."""
    set_tensor(model, name, nn.Parameter(value, requires_grad=False))
