"""A record of one forward: inputs of modules, and attention calls."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]


@dataclass
class Call:
    """A call of one module: shapes of its tensors, by argument (`pe`, `x[0]`) and by position in its output."""

    inputs: dict[str, Shape] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, Shape] = field(default_factory=dict)


@dataclass
class Record:
    """The first call of every module, in order, and the attention calls: module, queries, keys."""

    calls: dict[str, Call] = field(default_factory=dict)
    attention: list[tuple[str, int, int]] = field(default_factory=list)


def record(model: Any, inputs: dict[str, Any]) -> Record:
    """Run `apply_model` once. Attention is not computed: its result is empty."""
    result, running = Record(), []
    handles = []
    for name, module in model.diffusion_model.named_modules():
        handles.append(module.register_forward_pre_hook(_entering(name, result, running), with_kwargs=True))
        handles.append(module.register_forward_hook(_leaving(name, result, running)))

    def override(_: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *rest: Any, **options: Any) -> Tensor:
        dim = 2 if options.get("skip_reshape") else 1
        result.attention.append((running[-1], q.shape[dim], k.shape[dim]))
        if options.get("skip_reshape") and not options.get("skip_output_reshape"):
            return q.new_zeros(q.shape[0], q.shape[2], q.shape[1] * v.shape[3])
        return torch.zeros_like(q)

    try:
        with torch.inference_mode():
            model.apply_model(**inputs, transformer_options={"optimized_attention_override": override})
    finally:
        for handle in handles:
            handle.remove()
    return result


def _entering(name: str, result: Record, running: list[str]) -> Any:
    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running.append(name)
        if name in result.calls:
            return
        call = result.calls[name] = Call()
        parameters = list(inspect.signature(module.forward).parameters)
        named = {**dict(zip(parameters, args, strict=False)), **kwargs}
        for key, value in named.items():
            if key != "transformer_options":
                call.inputs.update(_tensors(key, value))
                if _counts(value):
                    call.numbers[key] = value

    return enter


def _leaving(name: str, result: Record, running: list[str]) -> Any:
    def leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        running.pop()
        if not result.calls[name].outputs:
            result.calls[name].outputs.update(_tensors("", output))

    return leave


def _counts(value: Any) -> bool:
    """Return whether an argument may be token positions: a number, or ranges of them."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(_counts(item) or item is None for item in value)
    return isinstance(value, int) and not isinstance(value, bool)


def _tensors(key: str, value: Any) -> Iterator[tuple[str, Shape]]:
    if isinstance(value, Tensor):
        yield key, tuple(value.shape)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _tensors(f"{key}[{index}]", item)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _tensors(f"{key}[{name!r}]", item)


def block_lists(model: nn.Module) -> list[tuple[str, str]]:
    """Return lists of blocks: the pattern for a plan, and the path of the first block."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len(module) and "*" not in name:
            first = next(iter(dict(module.named_children())))
            inside = any(name.startswith(f"{path.rpartition('.')[0]}.") for _, path in found)
            if not inside and any(True for _ in module[first if isinstance(module, nn.ModuleDict) else 0].children()):
                found.append((f"{name}.{re.sub(r'[0-9]+$', '*', first)}", f"{name}.{first}"))
    return found
