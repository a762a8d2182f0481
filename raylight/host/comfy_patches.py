"""Attention of models that call ComfyUI's function without handing on `transformer_options`.

ComfyUI's hook, `optimized_attention_override`, travels in these options, so such calls would never meet it. This is the
one place that replaces something in ComfyUI: the name `optimized_attention` in the model's own Python module, by a
function that adds the options of the forward being run.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

NAME = "optimized_attention"
_MARK = "raylight_door"

_current: list[dict[str, Any]] = []


def route_unhooked_calls(model: nn.Module, modules: Iterable[str]) -> None:
    """From now on attention calls in these Python modules get the options of the model's forward, if there is one.

    Raises RuntimeError when ComfyUI's module does not have the function any more.
    """
    modules = tuple(modules)
    if not modules:
        return
    for name in modules:
        module = importlib.import_module(name)
        function = getattr(module, NAME, None)
        if not callable(function) or not hasattr(function, "__wrapped__"):
            raise RuntimeError(
                f"this version of ComfyUI has changed {name}: it has no {NAME} that takes an override, so "
                f"{type(model).__name__} cannot be split over workers. Update Raylight, or use GPU = 1"
            )
        if not hasattr(function, _MARK):
            setattr(module, NAME, _with_options(function))
    model.register_forward_pre_hook(_enter, with_kwargs=True)
    model.register_forward_hook(_leave, always_call=True)


def _with_options(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def attention(*args: Any, **kwargs: Any) -> Any:
        if _current and kwargs.get("transformer_options") is None:
            kwargs["transformer_options"] = _current[-1]
        return function(*args, **kwargs)

    setattr(attention, _MARK, True)
    return attention


def _enter(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _current.append(kwargs.get("transformer_options") or {})


def _leave(*_: Any) -> None:
    _current.pop()
