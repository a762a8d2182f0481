"""What nodes have changed on a model itself, past ComfyUI's patches: as data, and put on a worker's model for a run."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from torch import nn

_MISSING = object()

# What `nn.Module` itself keeps in a module, and how attributes begin that ComfyUI and PyTorch set on the modules of
# models that they load, move and split: none of these is a change of a node's.
OF_TORCH = frozenset(vars(nn.Module()))
OF_LOADING = ("comfy_", "prev_comfy_", "weight_", "bias_", "_")
SIMPLE = (bool, int, float, str, bytes, type(None))

# PyTorch's hooks that take part in a forward, by the dict in which a module keeps them.
HOOKS = {"_forward_pre_hooks": "register_forward_pre_hook", "_forward_hooks": "register_forward_hook"}


@dataclass(frozen=True, slots=True)
class Change:
    """An attribute of a module, a hook on it, or an attribute of a class or of a Python module.

    `owner` is the path of a module from ComfyUI's `BaseModel` ("" for that itself), a class, or "python:" and the name
    of a Python module. `name` is the attribute, or a key of HOOKS; a hook `takes_kwargs` as it was registered.
    """

    owner: str | type
    name: str
    value: Any
    takes_kwargs: bool = False

    @property
    def place(self) -> str:
        """Where it is, for a message."""
        owner = self.owner.__qualname__ if isinstance(self.owner, type) else self.owner.removeprefix("python:")
        return f"{owner}.{self.name}".lstrip(".")


@contextmanager
def changed(patcher: ModelPatcher, changes: Sequence[Change]) -> Iterator[None]:
    """Within it the patcher's model has these changes; object patches come on top of them."""
    if not changes:
        yield
        return
    base = patcher.model
    with ExitStack() as stack:
        # What ComfyUI left there of an earlier run, and what this one leaves: its backup would be of what is changed.
        patcher.unpatch_model(unpatch_weights=False)
        for change in changes:
            if change.name in HOOKS:
                register = getattr(_owner(base, change), HOOKS[change.name])
                stack.callback(register(change.value, with_kwargs=change.takes_kwargs).remove)
            else:
                stack.enter_context(_set(_owner(base, change), change.name, change.value))
        stack.callback(patcher.unpatch_model, unpatch_weights=False)
        yield


def _owner(base: BaseModel, change: Change) -> Any:
    if isinstance(change.owner, type):
        return change.owner
    if change.owner.startswith("python:"):
        return importlib.import_module(change.owner.removeprefix("python:"))
    return base.get_submodule(change.owner)


@contextmanager
def _set(owner: Any, name: str, value: Any) -> Iterator[None]:
    if name == "__class__":
        before: Any = type(owner)
    elif isinstance(owner, nn.Module):
        before = owner.__dict__.get(name, _MISSING)
    else:
        before = vars(owner).get(name, _MISSING)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
