"""A sharded model after a forward that has failed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule


def reset(model: nn.Module) -> bool:
    """Bring a model of `fsdp.shard` back to where a forward may begin: nothing is gathered, or being gathered.

    For a forward that has failed at the same place on all ranks: it waits for what they have begun. Returns False where
    this version of PyTorch cannot do that; the model must not be used any more then. True for a model that is not
    sharded.
    """
    if not isinstance(model, FSDPModule) or _is_at_rest(model):
        return True
    if not hasattr(model, "reset_iter_state"):
        return False
    model.reset_iter_state()
    return _is_at_rest(model)


def _is_at_rest(model: nn.Module) -> bool:
    """Whether no module of it is within a forward, or has begun to gather. By FSDP2's own marks: where they have other
    names, nothing is known."""
    unknown = object()
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        state = module._get_fsdp_state()
        for one in (state, *_groups(state)):
            if getattr(getattr(one, "_training_state", None), "name", "") != "IDLE":
                return False
        if any(getattr(group, "_all_gather_result", unknown) is not None for group in _groups(state)):
            return False
    return True


def _groups(state: Any) -> Iterator[Any]:
    if hasattr(state, "_fsdp_param_groups"):  # since PyTorch 2.12
        yield from state._fsdp_param_groups
    elif (group := getattr(state, "_fsdp_param_group", None)) is not None:
        yield group
