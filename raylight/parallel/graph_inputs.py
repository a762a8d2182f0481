"""The inputs of a forward that is replayed as a graph: what they have in common from call to call, and static copies.

A captured graph reads the memory that it was captured with. So two calls may share a graph if their values are equal
but for the content of tensors on the device, which is copied to where the graph reads it.
"""

from __future__ import annotations

import enum
import uuid
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from .tokens import LocalResiduals

_LARGEST_ON_HOST = 4096  # elements of a tensor in system memory whose values are compared
_PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
    uuid.UUID,
    enum.Enum,
)
_MISSING = "(not there)"

# Of every forward's options, different in each run: only code of node packs has a use for them, and with such code in
# the forward nothing is captured.
UNREAD = frozenset({"uuids"})


class NotStaticError(Exception):
    """An input cannot be part of a graph; the message is the end of a sentence that says why."""


def outline(value: Any) -> tuple[Hashable, list[Tensor]]:
    """Return what must be equal for two values to share a graph, and the tensors whose content may differ, in order.

    Raises NotStaticError: for objects of unknown kinds, and functions, which may do anything.
    """
    tensors: list[Tensor] = []
    return _outline(value, tensors), tensors


def _outline(value: Any, tensors: list[Tensor]) -> Hashable:
    if isinstance(value, Tensor):
        return _outline_tensor(value, tensors)
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, LocalResiduals):
        return LocalResiduals, value.stream, tuple(_outline(item, tensors) for item in value)
    if type(value) in (list, tuple):
        return type(value), tuple(_outline(item, tensors) for item in value)
    if isinstance(value, dict):
        return dict, tuple((_outline(key, tensors), _outline(item, tensors)) for key, item in value.items())
    if isinstance(value, (set, frozenset)) and all(isinstance(item, _PLAIN) for item in value):
        return type(value), frozenset(value)
    raise NotStaticError(f"an input is a {type(value).__module__}.{type(value).__qualname__}")


def _outline_tensor(value: Tensor, tensors: list[Tensor]) -> Hashable:
    if type(value) not in (Tensor, torch.nn.Parameter):
        raise NotStaticError(f"an input is a {type(value).__name__}")
    if value.device.type == "cpu" and not _cpu_counts_as_device:
        if value.numel() > _LARGEST_ON_HOST:
            raise NotStaticError(f"an input of {value.numel()} elements is in system memory")
        plain = value.detach().resolve_conj().resolve_neg()
        content = plain.contiguous().flatten().view(torch.uint8) if value.numel() else value.new_empty(0)
        return "host", value.dtype, value.shape, bytes(content.tolist())
    tensors.append(value)
    return Tensor, value.shape, value.stride(), value.dtype, value.device, value.is_inference()


_cpu_counts_as_device = False


def treat_cpu_as_device(on: bool = True) -> None:
    """Treat tensors in system memory as the graph's own, for models that run there: to try the logic without a GPU."""
    global _cpu_counts_as_device
    _cpu_counts_as_device = on


def rebuilt(value: Any, replace: Iterator[Tensor]) -> Any:
    """Return a copy of a value that `outline` accepts, with the tensors that it found replaced in their order.

    Containers are new ones, as models change some that they are given.
    """
    if isinstance(value, Tensor):
        on_host = value.device.type == "cpu" and not _cpu_counts_as_device
        return value.clone() if on_host else next(replace)
    if isinstance(value, _PLAIN) or isinstance(value, (set, frozenset)):
        return value
    if isinstance(value, LocalResiduals):
        return value.with_items([rebuilt(item, replace) for item in value])
    if isinstance(value, dict):
        return {key: rebuilt(item, replace) for key, item in value.items()}
    return type(value)(rebuilt(item, replace) for item in value)


def static_copy(tensor: Tensor) -> Tensor:
    """Return a tensor of its own memory with the layout and content of another; expanded dims stay expanded."""
    core = _without_expanded(tensor)
    return (
        torch.empty_strided(core.shape, core.stride(), dtype=core.dtype, device=core.device)
        .copy_(core)
        .expand(tensor.shape)
    )


def fill_static(static: Tensor, tensor: Tensor) -> None:
    """Copy the content of a tensor of the same layout into one of `static_copy`."""
    if static.data_ptr() != tensor.data_ptr():
        _without_expanded(static).copy_(_without_expanded(tensor), non_blocking=True)


def _without_expanded(tensor: Tensor) -> Tensor:
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


class WatchedOptions(dict):
    """Options that record which of their entries a forward reads, so that others may change from call to call.

    `reads` are the names, whether there was such an entry or not. Who goes through all entries has read them all.
    """

    def __init__(self, options: Mapping[str, Any], reads: set[str] | None = None, own: frozenset[str] = frozenset()):
        super().__init__(options)
        self.reads: set[str] = set() if reads is None else reads
        self._own = set(own)  # entries that the forward itself has set: none of the caller's

    def _read(self, key: Any) -> None:
        if key not in self._own:
            self.reads.add(key)

    def _read_all(self) -> None:
        self.reads.add("*")
        for key in super().keys():
            self._read(key)

    def __getitem__(self, key: Any) -> Any:
        self._read(key)
        return super().__getitem__(key)

    def __contains__(self, key: Any) -> bool:
        self._read(key)
        return super().__contains__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        self._read(key)
        return super().get(key, default)

    def pop(self, key: Any, *default: Any) -> Any:
        self._read(key)
        self._own.add(key)
        return super().pop(key, *default)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        self._read(key)
        return super().setdefault(key, default)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._own.add(key)
        super().__setitem__(key, value)

    def update(self, *others: Any, **named: Any) -> None:
        for key, value in dict(*others, **named).items():
            self[key] = value

    def copy(self) -> WatchedOptions:
        return WatchedOptions(dict(super().items()), self.reads, frozenset(self._own))

    __copy__ = copy

    def __iter__(self) -> Iterator[Any]:
        self._read_all()
        return super().__iter__()

    def __len__(self) -> int:
        self._read_all()
        return super().__len__()

    def keys(self) -> Any:
        self._read_all()
        return super().keys()

    def values(self) -> Any:
        self._read_all()
        return super().values()

    def items(self) -> Any:
        self._read_all()
        return super().items()

    def __or__(self, other: Any) -> Any:
        return dict(self) | other


def outline_read(options: Mapping[str, Any], reads: frozenset[str]) -> tuple[Hashable, list[Tensor]]:
    """As `outline`, of the entries of `options` that a forward has read. Raises as `outline`."""
    return outline(read_of(options, reads))


def outline_each(options: Mapping[str, Any]) -> dict[str, Hashable]:
    """Return the outline of each entry of `options`, of those that have one, for `changed`."""
    found: dict[str, Hashable] = {}
    for name, value in options.items():
        with suppress(NotStaticError):
            found[name] = outline(value)[0]
    return found


def changed(before: Mapping[str, Hashable], options: Mapping[str, Any], reads: frozenset[str]) -> list[str]:
    """Return which entries of `options` that a forward has read are not as in `before`, of `outline_each`: those that
    it has changed in place.
    """
    after = outline_each({name: value for name, value in read_of(options, reads).items() if name in before})
    return [name for name in after if after[name] != before[name]]


def read_of(options: Mapping[str, Any], reads: frozenset[str]) -> dict[str, Any]:
    """Return the entries of `options` that a forward has read, in a fixed order; a text for those that are not there.

    With "*" in `reads`, for a forward that goes through all of them, those are all that there are now.
    """
    names = set(reads) | (set(options) if "*" in reads else set())
    wanted = sorted((name for name in names if name not in UNREAD and name != "*"), key=str)
    return {name: options.get(name, _MISSING) for name in wanted}


def present(read: Mapping[str, Any]) -> dict[str, Any]:
    """Return of the entries of `read_of` those that are there."""
    return {name: value for name, value in read.items() if not (isinstance(value, str) and value == _MISSING)}


def copies_of(output: Any, copy: Callable[[Tensor], Tensor] = torch.clone) -> Any:
    """Return an output with every tensor copied out of the graph's memory.

    Raises NotStaticError: for outputs other than tensors, lists and tuples of them, and None.
    """
    if isinstance(output, Tensor):
        return copy(output)
    if output is None:
        return None
    if type(output) in (list, tuple):
        return type(output)(copies_of(item, copy) for item in output)
    raise NotStaticError(f"the forward returns a {type(output).__name__}")
