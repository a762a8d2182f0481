"""All of ComfyUI that Raylight replaces at run time.

For as long as a `with` block (`replaced`, `replaced_on`), after which the original is back:

- `comfy.model_patcher.CoreModelPatcher`, `comfy.utils.load_torch_file` and
  `comfy.model_detection.convert_diffusers_mmdit`, while `checkpoint` has ComfyUI load a model: weights are to stay in
  their file.
- `comfy.model_patcher.CoreModelPatcher` and `ModelPatcher`, and `comfy.model_management.xformers_enabled_vae`, while
  `vae_file` has ComfyUI load a VAE: rows are followed through PyTorch's attention.
- Functions that decide by a GPU's memory in how many parts a VAE computes, while it is split by rows: they return the
  smallest of all ranks (`RowRule.by_memory`).
- Functions of ComfyUI's models, their classes and Python modules that node packs have replaced in ComfyUI's process:
  replaced in the workers too, for one run (`patcher_state.changed`).
- Import statements of ComfyUI's modules, while a worker imports what its service needs (`late_imports`): models, text
  encoders and libraries are imported when they are first used.
- `memory_required` of a model whose weights are on the workers, and `comfy.model_management.load_models_gpu` and
  `free_memory`, while ComfyUI makes room for it: it needs none (`driver.remote_model`).

For the life of the process:

- `optimized_attention`, and `optimized_attention_for_device`, which chooses such a function, in the Python modules of
  models that call it without their `transformer_options` (`route_unhooked_calls`): ComfyUI's
  `optimized_attention_override` is one of these options.
- In a worker, the packages that models and text encoders lie in: a module that nothing has imported yet is imported
  when it is asked for (`late_imports`).

Not here, as it is not ComfyUI's: methods of model instances that Raylight has built for itself (`driver.weightless`,
`worker.batch_parallel`); and the command line and folders that `settings` gives to ComfyUI in a worker.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .late_imports import LateImports

NAME = "optimized_attention"
FOR_DEVICE = "optimized_attention_for_device"
_MARK = "raylight_routed"
_MISSING = object()

# What ComfyUI imports for models, text encoders and samplers of which a worker uses few, or none.
_LATE_LIBRARIES = ("av", "scipy", "torchaudio", "torchsde", "torchvision", "transformers")
_LATE = (
    "comfy.audio_encoders",
    "comfy.background_removal",
    "comfy.cldm",
    "comfy.image_encoders",
    "comfy.ldm",
    "comfy.sd1_clip",
    "comfy.sdxl_clip",
    "comfy.t2i_adapter",
    "comfy.taesd",
    "comfy.text_encoders",
)
# What all of them share: attention functions, which Raylight looks at, and base classes.
_NOT_LATE = ("comfy.ldm.modules", "comfy.ldm.common_dit", "comfy.ldm.util")

_current: list[dict[str, Any]] = []


@contextmanager
def late_imports() -> Iterator[LateImports]:
    """Within it ComfyUI's modules import models, text encoders and some libraries when they first use them."""
    late = LateImports(("comfy", "comfy_api"), _LATE_LIBRARIES, _LATE, _NOT_LATE)
    with replaced(builtins, "__import__", late.instead_of):
        yield late


@contextmanager
def replaced(module: ModuleType, name: str, replace: Callable[[Any], Any]) -> Iterator[None]:
    """Within it a function or class of a module of ComfyUI is `replace(original)`.

    Raises RuntimeError: when this ComfyUI does not have it.
    """
    original = getattr(module, name, None)
    if not callable(original):
        raise RuntimeError(f"this ComfyUI has no {module.__name__}.{name}, which Raylight needs: update Raylight")
    with replaced_on(module, name, replace(original)):
        yield


@contextmanager
def replaced_on(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within it the attribute `name` of a Python module, class or object is `value`; one that `owner` did not have
    itself is deleted afterwards. `name` may be `__class__`.
    """
    held = {**vars(owner), **(owner._modules if isinstance(owner, nn.Module) else {})}
    before = type(owner) if name == "__class__" else held.get(name, _MISSING)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def route_unhooked_calls(model: nn.Module, modules: Iterable[str]) -> list[RemovableHandle]:
    """Pass the options of the model's forward to attention calls in these Python modules until the handles are removed.

    Raises RuntimeError: when ComfyUI's module has no such function.
    """
    modules = tuple(modules)
    if not modules:
        return []
    for name in modules:
        module = importlib.import_module(name)
        found = doors_in(module)
        if not found:
            raise RuntimeError(
                f"this version of ComfyUI has changed {name}: it has no {NAME} that takes an override, so "
                f"{type(model).__name__} cannot be split over workers. Update Raylight, or use GPU = 1"
            )
        for door in found:
            function = getattr(module, door)
            if not hasattr(function, _MARK):
                setattr(module, door, (_with_options if door == NAME else _choosing)(function))
    return [
        model.register_forward_pre_hook(_enter, with_kwargs=True),
        model.register_forward_hook(_leave, always_call=True),
    ]


def doors_in(module: ModuleType) -> tuple[str, ...]:
    """Return the names by which a module of ComfyUI has attention functions that take an override. None if one of them
    does not take any.
    """
    found = {door: getattr(module, door) for door in (NAME, FOR_DEVICE) if callable(getattr(module, door, None))}
    for door, function in found.items():
        attention = function if door == NAME else function(torch.device("cpu"))
        if not hasattr(attention, "__wrapped__"):
            return ()
    return tuple(found)


def modules_with_attention(model: nn.Module) -> tuple[str, ...]:
    """Return the Python modules of a model's classes that have ComfyUI's attention, whose calls can be routed."""
    names = dict.fromkeys(type(module).__module__ for module in model.modules())
    return tuple(name for name in names if name in sys.modules and doors_in(sys.modules[name]))


@functools.cache
def _with_options(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def attention(*args: Any, **kwargs: Any) -> Any:
        if _current and kwargs.get("transformer_options") is None:
            kwargs["transformer_options"] = _current[-1]
        return function(*args, **kwargs)

    setattr(attention, _MARK, True)
    return attention


def _choosing(choose: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that chooses as ComfyUI's does, of functions that get the options."""

    @functools.wraps(choose)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        return _with_options(choose(*args, **kwargs))

    setattr(chosen, _MARK, True)
    return chosen


def _enter(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _current.append(kwargs.get("transformer_options") or {})


def _leave(*_: Any) -> None:
    _current.pop()
