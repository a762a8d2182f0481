"""What nodes set on a model's patcher and in its model: read in ComfyUI's process, applied to a worker's."""

from __future__ import annotations

import importlib
import inspect
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import comfy.patcher_extension
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import nn

from .comfy_patches import replaced_on
from .recipe import REPLICATED

# How keys of the diffusion model begin in ComfyUI's state dicts, patches and object patches.
DIFFUSION_MODEL = "diffusion_model."
# Attributes of ComfyUI's `ModelPatcher` that a node can change, apart from `patches`, which are sent by `ModelJob`.
_ALL = (
    "object_patches",
    "weight_wrapper_patches",
    "force_cast_weights",
    "injections",
    "attachments",
    "additional_models",
    "callbacks",
    "model_options",
    "hook_patches",
    "hook_mode",
)
# Of these, what the diffusion model itself needs when the sampling loop stays in ComfyUI.
_INNER = ("weight_wrapper_patches", "force_cast_weights", "injections")
# Of these, what ComfyUI sets on the layers of weights when it loads them, and at no other time.
_LOADED = ("force_cast_weights", "weight_wrapper_patches")
_VERSION = "patches_uuid"

PatcherState = dict[str, Any]


def of_run(patcher: ModelPatcher) -> PatcherState:
    """Return the state that a worker needs to sample a model."""
    return {name: getattr(patcher, name) for name in (*_ALL, _VERSION) if hasattr(patcher, name)}


def of_forward(patcher: ModelPatcher) -> PatcherState:
    """Return the state that a worker needs to call the diffusion model."""
    found = {name: getattr(patcher, name) for name in (*_INNER, _VERSION) if hasattr(patcher, name)}
    # One of the forward is applied to the call in ComfyUI's process.
    inside = {
        name: value
        for name, value in patcher.object_patches.items()
        if name.startswith(DIFFUSION_MODEL) and name != f"{DIFFUSION_MODEL}forward"
    }
    return found | {"object_patches": inside}


def apply_state(patcher: ModelPatcher, state: PatcherState, sharding: str) -> None:
    """Set the state on a worker's patcher.

    Raises ValueError: for what sharded weights cannot have.
    """
    if sharding != REPLICATED:
        for name, what in (
            ("weight_wrapper_patches", "functions around weights"),
            ("force_cast_weights", "a compute dtype of its own"),
            ("hook_patches", "scheduled LoRAs"),
        ):
            if state.get(name):
                raise ValueError(
                    f"the model has {what}, which split weights cannot have: switch FSDP off, or remove "
                    f"the node that sets this"
                )
    for name, value in state.items():
        if name != _VERSION:
            setattr(patcher, name, value)
    if any(state.get(name) for name in _LOADED):
        # Another version has ComfyUI load again. A patcher without these keeps its version, and so its loaded weights.
        patcher.patches_uuid = uuid.uuid5(patcher.patches_uuid, str(state[_VERSION]))


OPTIONS = "transformer_options"
OVERRIDE = "optimized_attention_override"


def run_with_wrappers(
    model: nn.Module, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Call `inner(*args, **kwargs)` within the wrappers that the model's own forward would run."""
    options = kwargs.get(OPTIONS)
    options = {} if options is None else options  # to ask whether it is empty would read all, for a graph
    wrappers = comfy.patcher_extension.get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
    forward = type(model).forward
    # Not every model of ComfyUI runs them.
    if not wrappers or "DIFFUSION_MODEL" not in forward.__code__.co_names:
        return inner(*args, **kwargs)
    # Wrappers look for arguments at the positions of the model's own forward.
    call = inspect.signature(forward).bind(model, *args, **kwargs)
    call.apply_defaults()
    return WrapperExecutor.new_class_executor(inner, model, wrappers).execute(*call.args[1:], **call.kwargs)


def bind_arguments(
    forward: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments as ComfyUI's `BaseModel` passes them: the first two by position, the others by name."""
    signature = inspect.signature(forward)
    if any(one.kind is one.VAR_POSITIONAL for one in signature.parameters.values()):
        return args, dict(kwargs)
    call = signature.bind(model, *args, **kwargs).arguments
    rest = next((one.name for one in signature.parameters.values() if one.kind is one.VAR_KEYWORD), "")
    by_name = call | call.pop(rest, {})
    by_name.pop(next(iter(signature.parameters)))
    by_name.pop(rest, None)
    first = list(by_name)[:2]
    return tuple(by_name[name] for name in first), {k: v for k, v in by_name.items() if k not in first}


# The attributes of a bare `nn.Module`, and prefixes of those that ComfyUI and PyTorch set on modules when they load,
# move and shard models: none of these is a node's change.
OF_TORCH = frozenset(vars(nn.Module()))
OF_LOADING = ("comfy_", "prev_comfy_", "weight_", "bias_", "seed_key", "_")
SIMPLE = (bool, int, float, str, bytes, type(None))

# How to register PyTorch's hooks on a forward, by the dict in which a module keeps them.
HOOKS = {"_forward_pre_hooks": "register_forward_pre_hook", "_forward_hooks": "register_forward_hook"}


@dataclass(frozen=True, slots=True)
class Change:
    """A node's change of an attribute of a module, of a hook on it, or of an attribute of a class or a Python module.

    `owner` is the path of a module in ComfyUI's `BaseModel` ("" for the model itself), a class, or "python:" and the
    name of a Python module. `name` is the attribute, or a key of HOOKS; a hook `takes_kwargs` as it was registered.
    """

    owner: str | type
    name: str
    value: Any
    takes_kwargs: bool = False

    @property
    def place(self) -> str:
        """The owner's name and the attribute, for a message."""
        owner = self.owner.__qualname__ if isinstance(self.owner, type) else self.owner.removeprefix("python:")
        return f"{owner}.{self.name}".lstrip(".")


@contextmanager
def changed(patcher: ModelPatcher, changes: Sequence[Change]) -> Iterator[None]:
    """Within it the patcher's model has these changes; object patches are applied on top of them."""
    if not changes:
        yield
        return
    base = patcher.model
    with ExitStack() as stack:
        # Object patches that ComfyUI has left there: its backup would be of what is changed here. So too afterwards.
        patcher.unpatch_model(unpatch_weights=False)
        for change in changes:
            if change.name in HOOKS:
                register = getattr(_owner(base, change), HOOKS[change.name])
                stack.callback(register(change.value, with_kwargs=change.takes_kwargs).remove)
            else:
                stack.enter_context(replaced_on(_owner(base, change), change.name, change.value))
        stack.callback(patcher.unpatch_model, unpatch_weights=False)
        yield


def _owner(base: BaseModel, change: Change) -> Any:
    if isinstance(change.owner, type):
        return change.owner
    if change.owner.startswith("python:"):
        return importlib.import_module(change.owner.removeprefix("python:"))
    return base.get_submodule(change.owner)
