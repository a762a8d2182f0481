"""The doors to ComfyUI's attention: an override in a forward's options, and the functions that look for one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import comfy.ldm.modules.attention as attention
import torch

from raylight.host import comfy_patches
from raylight.host.patcher_state import OPTIONS, OVERRIDE
from raylight.plans import all_plans

from .seam import GONE, Seam, exists, find

WHERE = "raylight/worker/transformer_options.py"
STOPS = "each worker attends to its own tokens only, or models are refused"
FUNCTIONS = (
    "optimized_attention",
    "optimized_attention_masked",
    "attention_basic",
    "attention_pytorch",
    "attention_split",
    "attention_sub_quad",
)
CONTAINER = "AttentionTensorContainer"
PREFERENCE = "ComfyAttention"  # from about 0.38 on: which attention a checkpoint prefers
HEADS, TOKENS, WIDTH = 2, 3, 4


def seams() -> list[Seam]:
    """Return a seam for each function, for the forms in which models call one, and for each plan's doors."""
    found = [
        Seam(f"comfy.ldm.modules.attention.{name}", WHERE, STOPS, functools.partial(_override_reached, name))
        for name in FUNCTIONS
    ]
    found.append(Seam("what optimized_attention_for_device returns", WHERE, STOPS, _for_device))
    if hasattr(attention, CONTAINER):
        found.append(Seam(f"an override for queries, keys and values in {CONTAINER}", WHERE, STOPS, _containers))
    if hasattr(attention, PREFERENCE):
        found.append(Seam("an override for a model that prefers an attention of its own", WHERE, STOPS, _preferring))
    for module, model in sorted(_doors()):
        stops = f"{model} cannot be split over workers"
        look = functools.partial(_is_door, module)
        found.append(Seam(f"the attention function in {module}", "raylight/host/comfy_patches.py", stops, look))
    return found


def _doors() -> Iterator[tuple[str, str]]:
    """Yield the modules that call attention without options, each with a model, of those that this ComfyUI has."""
    for plan in all_plans().values():
        if plan.unhooked and exists(plan.model) is None:
            yield from ((module, plan.model.rpartition(".")[2]) for module in plan.unhooked)


def _is_door(module: str) -> str | None:
    return None if comfy_patches.doors_in(find(module)) else "has no override any more"


def _override_reached(name: str) -> str | None:
    function = getattr(attention, name, None)
    return GONE if function is None else _wrong(function, lambda tensor: tensor)


def _for_device() -> str | None:
    return _wrong(attention.optimized_attention_for_device(torch.device("cpu")), lambda tensor: tensor)


def _containers() -> str | None:
    return _wrong(attention.optimized_attention, getattr(attention, CONTAINER))


def _preferring() -> str | None:
    preference = getattr(attention, PREFERENCE)()
    return _wrong(attention.optimized_attention, lambda tensor: tensor, preferred_attention=preference)


def _wrong(function: Callable[..., Any], pack: Callable[[torch.Tensor], Any], **more: Any) -> str | None:
    """Return what is wrong with how `function` calls an override, with arguments that `pack` makes of tensors and
    `more` by name.
    """
    calls: list[tuple[Any, ...]] = []

    def override(inner: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append((inner, args, kwargs))
        return args[0]

    q = torch.randn(1, HEADS, TOKENS, WIDTH)
    function(pack(q), pack(q), pack(q), HEADS, skip_reshape=True, **more, **{OPTIONS: {OVERRIDE: override}})
    if not calls:
        return f"does not call the override in {OPTIONS}[{OVERRIDE!r}]"
    _, args, kwargs = calls[0]
    if not all(isinstance(value, torch.Tensor) for value in args[:3]):
        return "calls the override with something else than tensors q, k and v"
    if args[3:4] != (HEADS,) or not kwargs.get("skip_reshape"):
        return "calls the override without the number of heads or the layout of tensors"
    return None
