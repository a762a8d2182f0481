"""A record of one forward: what modules get and return, and the attention calls in them. It keeps no tensor."""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Shape = tuple[int, ...]
MIXERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Call:
    """The first call of one module: shapes of its tensors, by argument (`pe`, `x[0]`, or `0` for `*args`) and by
    position in its output ("" for a single tensor). `carried` are arguments that are the output of an earlier block.
    `numbers` are arguments that may be positions of tokens.
    """

    inputs: dict[str, Shape] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, Shape] = field(default_factory=dict)
    carried: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class AttentionCall:
    """A call of ComfyUI's attention: the path of the innermost module, and numbers of heads, queries, keys."""

    path: str
    heads: int
    queries: int
    keys: int


@dataclass
class Record:
    """The first call of every module, in order, and the attention calls in these. `mixing` are paths of convolutions,
    `lists` the model's `block_lists`. The outputs of blocks are followed.
    """

    lists: dict[str, list[str]] = field(default_factory=dict)
    calls: dict[str, Call] = field(default_factory=dict)
    attention: list[AttentionCall] = field(default_factory=list)
    mixing: list[str] = field(default_factory=list)
    _running: list[str] = field(default_factory=list)
    _entered: dict[str, int] = field(default_factory=dict)
    _returned: dict[int, weakref.ref[Tensor]] = field(default_factory=dict)
    _blocks: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        self._blocks = frozenset(path for paths in self.lists.values() for path in paths)

    def attended(self, q: Tensor, k: Tensor) -> None:
        """Record an attention call with q (B, H, Sq, D) and k (B, HKV, Sk, D)."""
        path = self._running[-1] if self._running else ""
        if self._entered.get(path, 0) <= 1:  # a later call of the same module is like the first
            self.attention.append(AttentionCall(path, q.shape[1], q.shape[2], k.shape[2]))

    def entered(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record that a module is called."""
        self._running.append(name)
        self._entered[name] = self._entered.get(name, 0) + 1
        if name in self.calls:
            return
        call = self.calls[name] = Call()
        for key, value in named(module, args, kwargs).items():
            if key == "transformer_options":
                continue
            for place, tensor in tensors(str(key), value):
                call.inputs[place] = tuple(tensor.shape)
                if (known := self._returned.get(id(tensor))) is not None and known() is tensor:
                    call.carried.add(place)
            if _counts(value):
                call.numbers[str(key)] = value
        if isinstance(module, MIXERS) and max(module.kernel_size) > 1:
            self.mixing.append(name)

    def left(self, name: str, output: Any) -> None:
        """Record what a module returns."""
        self._running.pop()
        call, found = self.calls[name], dict(tensors("", output))
        if not call.outputs:
            call.outputs.update({place: tuple(tensor.shape) for place, tensor in found.items()})
        if name in self._blocks:
            self._returned.update({id(tensor): weakref.ref(tensor) for tensor in found.values()})


@contextmanager
def recording(model: nn.Module) -> Iterator[Record]:
    """Record the forwards of `model` within this context. Attention calls are told to `Record.attended`."""
    record, handles = Record(block_lists(model)), []
    for name, module in model.named_modules():

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            record.entered(name, module, args, kwargs)

        def leave(_: nn.Module, __: tuple[Any, ...], output: Any, name: str = name) -> None:
            record.left(name, output)

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def within(path: str, module: str) -> bool:
    """Return whether a path is that of a module, or of one in it."""
    return path == module or path.startswith(f"{module}.")


def named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str | int, Any]:
    """Return the arguments of a module's forward by name, and by position where it takes `*args`."""
    parameters = inspect.signature(module.forward).parameters
    names: list[str | int] = []
    for name, parameter in parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += range(len(names), len(args))
        else:
            names.append(name)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _counts(value: Any) -> bool:
    """Return whether an argument may be token positions: a number, or ranges of them."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(_counts(item) or item is None for item in value)
    return isinstance(value, int) and not isinstance(value, bool)


def tensors(key: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the tensors in an argument, by their place: `pe`, `x[0]`, `mask['image']`."""
    if isinstance(value, Tensor):
        yield key, value
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from tensors(f"{key}[{index}]", item)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from tensors(f"{key}[{name!r}]", item)


def block_lists(model: nn.Module) -> dict[str, list[str]]:
    """Return the outermost lists of blocks: the paths of each list's blocks, by their pattern in a plan (`blocks.*`).

    A block is a module with modules of its own.
    """
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)) or not len(module):
            continue
        paths = [f"{name}.{child}".lstrip(".") for child, _ in module.named_children()]
        if any(name.startswith(f"{path}.") for inner in found.values() for path in inner):
            continue
        if any(True for _ in next(module.children()).children()):
            found[re.sub(r"[0-9]+$", "*", paths[0])] = paths
    return found
