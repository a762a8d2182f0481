"""Objects of one process, packed so that another can have them: code by value where it has no importable name.

Ray's own pickler does the work, so closures travel. What it cannot know is left to the caller: objects that the other
process has already are replaced by references, and tensors lie beside the rest, where Ray shares them between workers.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CellType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from ray import cloudpickle
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SerializedObject:
    """What `pack` made of an object. `tensors` are the bytes of its tensors, by number."""

    data: bytes
    tensors: tuple[np.ndarray, ...]

    @property
    def nbytes(self) -> int:
        return len(self.data) + sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor in a parcel."""

    number: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    parameter: bool
    on_cpu: bool


BY_VALUE = object()
"""What `reduce` of `pack` returns for a function that goes with its code, whatever its name."""
Reducer = Callable[[Any], Any]
Referrer = Callable[[Any], Any]


class _Packer(cloudpickle.CloudPickler):
    def __init__(self, file: io.BytesIO, refer: Referrer, reduce: Reducer) -> None:
        super().__init__(file, protocol=5)
        self.tensors: list[np.ndarray] = []
        self._refer = refer
        self._reduce = reduce
        # By id; the tensor is kept, or another could get its id.
        self._stored_already: dict[int, tuple[_Stored, Tensor]] = {}
        self._cells: dict[int, tuple[CellType, CellType]] = {}

    def persistent_id(self, value: Any) -> Any:
        reference = self._refer(value)
        if reference is not None:
            return reference
        if type(value) in (Tensor, torch.nn.Parameter) and value.layout == torch.strided:
            return self._stored(value)
        return None

    def reducer_override(self, value: Any) -> Any:
        reduced = self._reduce(value)
        if reduced is BY_VALUE:
            return self._dynamic_function_reduce(value)
        return super().reducer_override(value) if reduced is NotImplemented else reduced

    def _dynamic_function_reduce(self, function: FunctionType) -> Any:
        """As Ray's, but functions that share a variable of the function around them (`nonlocal`) still do there: Ray's
        gives each a cell of its own, with the same content at first."""
        make, arguments, *rest = super()._dynamic_function_reduce(function)
        if function.__closure__:
            arguments = (*arguments[:-1], tuple(map(self._cell, function.__closure__)))
        return make, arguments, *rest

    def _cell(self, cell: CellType) -> CellType:
        """An empty cell, the same one for the same; it is filled with the function's state."""
        return self._cells.setdefault(id(cell), (CellType(), cell))[0]

    def _stored(self, value: Tensor) -> _Stored:
        if id(value) not in self._stored_already:
            stored = _Stored(
                len(self.tensors),
                value.dtype,
                tuple(value.shape),
                isinstance(value, torch.nn.Parameter),
                value.device.type == "cpu",
            )
            self.tensors.append(as_bytes(value))
            self._stored_already[id(value)] = stored, value
        return self._stored_already[id(value)][0]


class _Unpacker(pickle.Unpickler):
    def __init__(
        self, parcel: SerializedObject, resolve: Callable[[Any], Any], device: torch.device, copies: bool
    ) -> None:
        super().__init__(io.BytesIO(parcel.data))
        self._tensors = parcel.tensors
        self._resolve = resolve
        self._device = device
        self._copies = copies
        self._made: dict[int, Tensor] = {}

    def persistent_load(self, reference: Any) -> Any:
        if not isinstance(reference, _Stored):
            return self._resolve(reference)
        if reference.number not in self._made:
            value = from_bytes(self._tensors[reference.number], reference.dtype, reference.shape)
            if not reference.on_cpu:
                value = value.to(self._device, copy=True)
            elif self._copies:
                value = value.clone()
            if reference.parameter:
                value = torch.nn.Parameter(value, requires_grad=False)
            self._made[reference.number] = value
        return self._made[reference.number]


def pack(value: Any, refer: Referrer, reduce: Reducer = lambda _: NotImplemented) -> SerializedObject:
    """Pack an object. `refer(part)` returns what stands for a part that the other process has, or None; `reduce` is as
    `pickle.Pickler.reducer_override`, or returns BY_VALUE.

    Raises whatever pickling raises for what cannot travel, and what `refer` and `reduce` raise.
    """
    file = io.BytesIO()
    packer = _Packer(file, refer, reduce)
    packer.dump(value)
    return SerializedObject(file.getvalue(), tuple(packer.tensors))


def unpack(parcel: SerializedObject, resolve: Callable[[Any], Any], device: torch.device, copies: bool = True) -> Any:
    """The object of a parcel. `resolve` turns what `refer` returned into this process's part.

    Tensors that were on the CPU are on the CPU, others on `device`. Without `copies` those on the CPU lie in memory
    that is shared with other workers and must not be written to.
    """
    return _Unpacker(parcel, resolve, device, copies).load()


@contextmanager
def by_value(modules: Iterable[ModuleType]) -> Iterator[None]:
    """Within it, classes and functions of these modules are packed with their code, as the other process cannot import
    them."""
    registered = []
    try:
        for module in modules:
            cloudpickle.register_pickle_by_value(module)
            registered.append(module)
        yield
    finally:
        for module in registered:
            cloudpickle.unregister_pickle_by_value(module)


def as_bytes(value: Tensor) -> np.ndarray:
    """The elements of a tensor of any dtype, (bytes,) uint8 on the CPU."""
    flat = value.detach().cpu().reshape(-1)
    if flat.stride(0) != 1:  # also of one expanded element, which PyTorch takes for contiguous
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy()


def from_bytes(data: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor of `as_bytes`, on the CPU, in the memory of `data`, which may be read only."""
    if data.size == 0:  # has no memory to look at as another dtype
        return torch.empty(shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writ.*able")
        return torch.from_numpy(data).view(dtype).view(shape)
