"""The hooks that split a model by its plan, without a change to its code.

Like context parallelism in diffusers (`ContextParallelSplitHook`), for uneven sizes and several streams.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .collectives import all_gather
from .plan import (
    Attention,
    CrossAttention,
    Dropped,
    FullAttention,
    Gather,
    GatherAround,
    Gathered,
    Input,
    SelfAttention,
    SequencePlan,
    Stream,
    alternatives,
)
from .tokens import TokenState


class SequenceHooks:
    """The hooks of one plan on one model, until `remove`. They do nothing while `tokens` has a degree of 1."""

    def __init__(
        self, model: nn.Module, plan: SequencePlan, tokens: TokenState, ulysses_degree: int | None = None
    ) -> None:
        """Install the hooks. `ulysses_degree` of the ranks split heads; all of them if it is None.

        Raises ValueError: when the model lacks what the plan names, has too few heads, or cannot be split.
        """
        self._plan, self._tokens = plan, tokens
        self._handles: list[RemovableHandle] = []
        heads, degree = plan.heads_of(model), ulysses_degree or tokens.degree
        if heads < degree:
            raise ValueError(
                f"{type(model).__name__} has {heads} attention heads, too few for ulysses_degree = {degree}: "
                f"choose at most {heads}"
            )
        reason = plan.refused(model)
        if reason is not None:
            raise ValueError(f"this {type(model).__name__} cannot be split over workers: {reason}")
        self._handles.append(model.register_forward_pre_hook(lambda *_: tokens.begin()))
        boundaries: dict[nn.Module, Boundary] = {}
        for path, rules in plan.inputs.items():
            for module in matching(model, path, plan):
                boundary = boundaries.setdefault(module, Boundary(module, tokens))
                boundary.add_inputs(rules, _parameter_positions(module, path, rules, plan))
        for path, attention in plan.attention.items():
            for module in matching(model, path, plan):
                boundaries.setdefault(module, Boundary(module, tokens)).add_attention(attention)
        for path, gather in plan.outputs.items():
            for module in matching(model, path, plan):
                rules = gather if isinstance(gather, tuple) else (gather,)
                boundaries.setdefault(module, Boundary(module, tokens)).add_outputs(rules)
        for boundary in boundaries.values():
            self._handles += boundary.install()
        self._handles.append(model.register_forward_hook(self._check_all_gathered))

    def remove(self) -> None:
        """Remove the hooks, which leaves the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _check_all_gathered(self, model: nn.Module, _: tuple[Any, ...], __: Any) -> None:
        sharded = {gather.stream for gather in self._plan.gathers() if self._tokens.is_sharded(gather.stream)}
        if sharded:
            raise RuntimeError(f"{type(model).__name__} ended with its tokens still split: {sorted(sharded)}")
        self._tokens.begin()  # frees what was kept for this forward


class Boundary:
    """All that a plan does where one module begins and ends, by one hook each: a model has many blocks."""

    def __init__(self, module: nn.Module, tokens: TokenState) -> None:
        self._module, self._tokens = module, tokens
        self._inputs: list[tuple[str | int, int, Input]] = []  # name, position, rule
        self._scopes: list[tuple[Attention | GatherAround, tuple[SelfAttention, ...]]] = []
        self._shards: list[GatherAround] = []
        self._gathers: list[Gather] = []
        self._drops: list[str] = []

    def add_inputs(self, rules: Mapping[str | int, Input], positions: Mapping[str | int, int]) -> None:
        """Convert these arguments, which are by name or at these positions."""
        # Streams first: what is aligned with them needs their sizes.
        ordered = sorted(rules.items(), key=lambda item: not isinstance(item[1], Stream))
        self._inputs += [(name, positions[name], rule) for name, rule in ordered]
        around = [rule for rule in rules.values() if isinstance(rule, GatherAround)]
        self._scopes += [(rule, ()) for rule in around]
        self._shards += around

    def add_attention(self, attention: Attention) -> None:
        """Let attention calls in the module follow this rule, and check that they are made."""
        kinds = tuple(_of_module(kind, self._module) for kind in alternatives(attention))
        rule = cast("Attention", kinds if isinstance(attention, tuple) else kinds[0])
        self._scopes.append((rule, tuple(kind for kind in kinds if isinstance(kind, SelfAttention))))

    def add_outputs(self, rules: tuple[Gather | Dropped, ...]) -> None:
        """Gather these streams of the output, and let others end here."""
        self._gathers += [rule for rule in rules if isinstance(rule, Gather)]
        self._drops += [rule.name for rule in rules if isinstance(rule, Dropped)]

    def install(self) -> list[RemovableHandle]:
        """Register the hooks that the rules need."""
        handles = []
        if self._inputs:
            handles.append(self._module.register_forward_pre_hook(self._enter, with_kwargs=True))
        elif self._scopes:
            handles.append(self._module.register_forward_pre_hook(self._push))
        if self._scopes or self._gathers or self._drops:
            handles.append(self._module.register_forward_hook(self._leave))
        return handles

    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._tokens.degree > 1:
            values = None
            for name, position, rule in self._inputs:
                if name in kwargs:
                    kwargs[name] = self._convert(kwargs[name], rule)
                elif position < len(args):
                    values = values or list(args)
                    values[position] = self._convert(values[position], rule)
            args = args if values is None else tuple(values)
        self._push()
        return args, kwargs

    def _push(self, *_: Any) -> None:
        for rule, _kinds in self._scopes:
            self._tokens.push(rule)

    def _leave(self, module: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
        for _rule, kinds in reversed(self._scopes):
            made = self._tokens.pop().calls
            for kind in kinds:
                expected, of_kind = cast("int", kind.calls), made.get(id(kind), 0)  # resolved by `_of_module`
                if of_kind < expected and self._are_sharded(kind):
                    raise RuntimeError(_bypassed(module, of_kind, expected))
        if self._tokens.degree > 1:
            for rule in self._shards:
                output = self._tokens.local_shard(output, rule.stream, rule.dim)
        # Before any of them: a module may return a stream twice, as it was before and after its last layer.
        due = {(gather.stream, gather.index): gather for gather in self._gathers if self._is_due(gather)}
        for name in self._drops:
            if self._tokens.is_sharded(name):
                self._tokens.mark_gathered(name)
        for gather in due.values():
            output = self._gathered(output, gather)
        return output

    def _convert(self, value: Any, rule: Input) -> Any:
        if isinstance(rule, (GatherAround, Gathered)):
            if isinstance(value, (list, tuple)):
                return type(value)(self._convert(item, rule) for item in value)
            return self._all_gather(value, rule.stream, rule.dim) if isinstance(value, Tensor) else value
        return self._tokens.shard(value, rule)

    def _are_sharded(self, kind: SelfAttention) -> bool:
        return self._tokens.degree > 1 and all(self._tokens.is_sharded(name) for name in kind.streams)

    def _is_due(self, gather: Gather) -> bool:
        return self._tokens.is_sharded(gather.stream) and gather.patched in ("", *self._tokens.patched)

    def _gathered(self, output: Any, gather: Gather) -> Any:
        if gather.index is None:
            return self._gather(output, gather)
        full = self._gather(output[gather.index], gather)
        return (*output[: gather.index], full, *output[gather.index + 1 :])

    def _gather(self, local: Tensor, gather: Gather) -> Tensor:
        """(..., S_LOCAL of `after` and the stream, ...) -> (..., S_LOCAL of `after` and S of the stream, ...)."""
        before = self._tokens.local_length(gather.after)
        head, tail = local.split([before, local.shape[gather.dim] - before], gather.dim)
        full = self._all_gather(tail, gather.stream, gather.dim)
        self._tokens.mark_gathered(gather.stream)
        full = self._tokens.restore_grid(full, gather.stream, gather.dim)
        return torch.cat([head, full], gather.dim) if before else full

    def _all_gather(self, local: Tensor, stream: str, dim: int) -> Tensor:
        own = self._tokens.without_placeholders(local, (stream,), dim)
        return all_gather(own, self._tokens.sizes(stream), dim, self._tokens.group)


def matching(model: nn.Module, path: str, plan: SequencePlan) -> Iterator[nn.Module]:
    """Iterate over the modules at a plan's path: none if it is a ModuleList that is empty (no single blocks, say).

    Raises ValueError: when the model has no such path.
    """
    names = [name for name, _ in model.named_modules()]
    if ".-1" in path:
        parent = path.partition(".-1")[0]
        path = path.replace(".-1", f".{len(list(model.get_submodule(parent).children())) - 1}", 1)
    expression = re.compile(re.escape(path).replace(r"\*", r"\d+"))
    found = [model.get_submodule(name) for name in names if expression.fullmatch(name)]
    if not found and f"{path.partition('.*')[0]}" not in names:
        raise ValueError(f"the plan of {plan.model} names '{path}', which this {type(model).__name__} does not have")
    return iter(found)


def _of_module(
    kind: SelfAttention | CrossAttention | FullAttention, module: nn.Module
) -> SelfAttention | CrossAttention | FullAttention:
    """Return the rule with `calls` and `mask` of this module."""
    if not isinstance(kind, SelfAttention):
        return kind
    calls = kind.calls(module) if callable(kind.calls) else kind.calls
    return replace(kind, mask=None if kind.mask is None else partial(kind.mask, module), calls=calls)


def _bypassed(module: nn.Module, made: int, expected: int) -> str:
    return (
        f"the attention of a {type(module).__name__} did not reach Raylight ({made} of {expected} calls did), so it "
        f"saw only this worker's shard of the tokens: a node has replaced it, or this version of ComfyUI calls "
        f"attention in another way. The result was discarded. Remove the node that changes this model's attention, "
        f"or use GPU = 1 or cfg_degree = GPU, with which every worker has all tokens of its images"
    )


def _parameter_positions(
    module: nn.Module, path: str, rules: Mapping[str | int, Input], plan: SequencePlan
) -> dict[str | int, int]:
    signature = inspect.signature(module.forward).parameters
    parameters = list(signature)
    takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.values())
    missing = [name for name in rules if isinstance(name, str) and name not in parameters]
    if missing and not takes_more:
        raise ValueError(
            f"the plan of {plan.model} names arguments {missing} of '{path}', "
            f"but {type(module).__name__}.forward has {parameters}: the plan is for another version of the model than "
            f"this ComfyUI has. Update ComfyUI and Raylight, or use GPU = 1"
        )
    # An argument in `**kwargs` never has a position.
    return {
        name: name if isinstance(name, int) else parameters.index(name) if name in parameters else sys.maxsize
        for name in rules
    }
