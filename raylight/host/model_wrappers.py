"""ComfyUI's DIFFUSION_MODEL wrappers, run around a forward that is not the model's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import comfy.patcher_extension
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import nn

OPTIONS = "transformer_options"


def wrapped(model: nn.Module, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """`inner(*args, **kwargs)` within the wrappers that the model's own forward would run; it gets options without
    them."""
    options = kwargs.get(OPTIONS) or {}
    wrappers = comfy.patcher_extension.get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
    forward = type(model).forward
    # Not every model of ComfyUI's runs them.
    if not wrappers or "DIFFUSION_MODEL" not in forward.__code__.co_names:
        return inner(*args, **kwargs)
    # Wrappers look for arguments at the places where models put them.
    call = inspect.signature(forward).bind(model, *args, **kwargs)
    call.apply_defaults()
    return WrapperExecutor.new_class_executor(inner, model, wrappers).execute(*call.args[1:], **call.kwargs)


def named(forward: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any],
          ) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments as ComfyUI's `BaseModel` passes them: the first two by position, the others by name."""
    signature = inspect.signature(forward)
    if any(one.kind is one.VAR_POSITIONAL for one in signature.parameters.values()):
        return args, dict(kwargs)
    call = signature.bind(model, *args, **kwargs).arguments
    rest = next((one.name for one in signature.parameters.values() if one.kind is one.VAR_KEYWORD), None)
    by_name = call | call.pop(rest, {})
    by_name.pop(next(iter(signature.parameters)))
    by_name.pop(rest, None)
    first = list(by_name)[:2]
    return tuple(by_name[name] for name in first), {k: v for k, v in by_name.items() if k not in first}
