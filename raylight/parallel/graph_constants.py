"""Constants that a forward makes in system memory and copies to the GPU, and what else of it a graph cannot have.

A copy from system memory cannot be captured, as CUDA would wait for it. Constants of a model (tables of positions,
frequencies) depend on nothing that changes between calls of one graph. So they are recorded in an ordinary forward, and
during capture a copy of what was recorded takes their place. That is exact, unlike to compute them on the GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .graph_inputs import NotStaticError

_TO = ("aten::to", "aten::_to_copy")
_INDEX = ("aten::index", "aten::index_put_", "aten::index_put", "aten::_unsafe_index")
_DISPATCH = "__torch_dispatch__"  # of its own, where a class of tensors is more than a name
# Operators after which the host waits for the GPU, to know a value or a size.
_WAITS = (
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::equal",
    "aten::allclose",
    "aten::nonzero",
    "aten::nonzero_numpy",
    "aten::argwhere",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
    "aten::repeat_interleave",
    "aten::linalg_qr",
)


@dataclass(slots=True)
class Constants:
    """What a forward copied from system memory, in its order: (source there, the copy on the device)."""

    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Bytes that the copies take on the device."""
        return sum(copy.nbytes for _, copy in self.copies)


@contextmanager
def recorded(device: torch.device, own: Iterable[Tensor] = ()) -> Iterator[_Recorder]:
    """Record what code within this context copies to `device`, and what it does that a graph cannot have. `own` are
    weights: copies of those in pinned memory can be captured.
    """
    recorder = _Recorder(device, own)
    with _OnHostFirst(device), recorder:
        yield recorder


@contextmanager
def supplied(constants: Constants, device: torch.device, own: Iterable[Tensor]) -> Iterator[_Supplier]:
    """Give code within this context the recorded constants. `own` are weights, and others that need not be kept for
    the graph.

    Code in it raises NotStaticError: when it copies other things than it did when it was recorded.
    """
    supplier = _Supplier(constants, device, own)
    with _OnHostFirst(device), supplier:
        yield supplier
    supplier.end()


class _Copies(TorchDispatchMode):
    """Finds copies from system memory to a device, and passes them to `_copy`."""

    def __init__(self, device: torch.device, own: Iterable[Tensor]) -> None:
        super().__init__()
        self._device = device
        self._known = {address for tensor in own if (address := _address(tensor))}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._device.type == "cpu":
            return func(*args, **kwargs)
        name = getattr(getattr(func, "_schema", None), "name", "")
        if name in _TO and self._is_copied(args[0]) and self._target(args[1:], kwargs):
            return self._copy(args[0], lambda: func(*args, **kwargs))
        if name == "aten::copy_" and self._is_copied(args[1]) and self._is_here(args[0]):
            source = self._copy(args[1], lambda: args[1].to(args[0].device))
            return func(args[0], source, *args[2:], **kwargs)
        if name in _INDEX and self._is_here(args[0]) and any(_is_on_host(one) for one in args[1]):
            indices = [
                self._copy(one, lambda one=one: one.to(args[0].device)) if _is_on_host(one) else one for one in args[1]
            ]
            args = (args[0], indices, *args[2:])
        return self._other(func, name, args, kwargs)

    def _is_copied(self, value: Any) -> bool:
        """Return whether a copy of a value would have to wait. A weight in pinned memory stays where it is."""
        return _is_on_host(value) and not (_address(value) in self._known and value.is_pinned())

    def _is_here(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.device.type == self._device.type

    def _target(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether the arguments of a conversion name the device."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, (str, torch.device)) and torch.device(value).type == self._device.type:
                return True
            if self._is_here(value):
                return True
        return False

    def _copy(self, source: Tensor, make: Any) -> Tensor:
        raise NotImplementedError

    def _other(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError


class _Recorder(_Copies):
    """Records constants; `obstacle` says what a graph cannot have, "" if there is nothing."""

    def __init__(self, device: torch.device, own: Iterable[Tensor]) -> None:
        super().__init__(device, own)
        self.constants = Constants()
        self.obstacle = ""
        self.operators = 0

    def _copy(self, source: Tensor, make: Any) -> Tensor:
        made = make()
        # Copies of both, as the forward may go on to change either.
        self.constants.copies.append((source.clone(), made.clone()))
        return made

    def _other(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.operators += 1
        if not self.obstacle and self._waits(name, args, kwargs):
            self.obstacle = f"the host waits for the GPU in it, at {name.replace('aten::', 'torch ')}"
        return func(*args, **kwargs)

    def _waits(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if name in _WAITS:
            return any(self._is_here(value) for value in tree_leaves((args, kwargs))) and not (
                name == "aten::repeat_interleave" and (not self._repeats_by_tensor(args) or kwargs.get("output_size"))
            )
        if name in _TO:
            return self._is_here(args[0]) and any(_names_host(value) for value in (*args[1:], *kwargs.values()))
        if name == "aten::copy_":
            return self._is_here(args[1]) and _is_on_host(args[0])
        if name in _INDEX:
            return any(isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in args[1])
        return False

    @staticmethod
    def _repeats_by_tensor(args: tuple[Any, ...]) -> bool:
        """Return whether a `repeat_interleave` (input, repeats) has its repeats on the device."""
        *_, repeats = args[:2]
        return isinstance(repeats, Tensor)


class _Supplier(_Copies):
    """Supplies constants; `outside` are tensors on the device that the forward used and that it did not make: they must
    live as long as the graph.
    """

    def __init__(self, constants: Constants, device: torch.device, own: Iterable[Tensor]) -> None:
        super().__init__(device, own)
        self._left = list(constants.copies)
        self.outside: list[Tensor] = []

    def end(self) -> None:
        """Check that all were copied. Raises NotStaticError: when there were fewer copies than recorded."""
        if self._left:
            raise NotStaticError("it does not copy the same constants to the GPU each time")

    def _copy(self, source: Tensor, make: Any) -> Tensor:
        before, made = self._left.pop(0) if self._left else (None, None)
        if before is None or made is None or before.dtype != source.dtype or not torch.equal(before, source):
            raise NotStaticError("it copies other values from system memory to the GPU each time")
        self._keep(made)
        return made.clone()  # the forward may change it, and each replay begins with the constant

    def _other(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for value in tree_leaves((args, kwargs)):
            if self._is_here(value):
                self._keep(value)
        output = func(*args, **kwargs)
        self._known.update(address for value in tree_leaves(output) if (address := _address(value)))
        return output

    def _keep(self, value: Tensor) -> None:
        address = _address(value)
        if address and address not in self._known:
            self._known.add(address)
            self.outside.append(value)


def _address(value: Any) -> int:
    """Return where a tensor's storage is, 0 for anything else, and for tensors that only wrap others."""
    if not isinstance(value, Tensor) or getattr(type(value), _DISPATCH) is not getattr(Tensor, _DISPATCH):
        return 0
    return value.untyped_storage().data_ptr()


def _is_on_host(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu"


def _names_host(value: Any) -> bool:
    return _is_on_host(value) or (isinstance(value, (str, torch.device)) and torch.device(value).type == "cpu")


class _OnHostFirst(TorchFunctionMode):
    """Makes tensors of Python's numbers in system memory and then copies them, where PyTorch would do both unseen."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            target = torch.device(kwargs["device"])
            if target.type == self._device.type != "cpu" and not isinstance(args[0], Tensor):
                return func(*args, **(kwargs | {"device": "cpu"})).to(target)
        if func is Tensor.new_tensor and args[0].device.type == self._device.type != "cpu":
            kwargs = {"dtype": args[0].dtype} | kwargs | {"device": "cpu"}
            return torch.tensor(*args[1:], **kwargs).to(args[0].device)
        return func(*args, **kwargs)
