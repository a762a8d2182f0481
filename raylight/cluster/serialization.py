"""Serialization of objects for another process, with code by value where it has no importable name.

Ray's own pickler does the work, so closures can be sent. The caller replaces objects that the other process has already
by references. Tensors are kept beside the pickle, so that Ray shares their memory between workers.
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
from ray.cloudpickle import cloudpickle
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SerializedObject:
    """The result of `pack`: a pickle, and the bytes of the tensors in it, each (bytes,) uint8."""

    data: bytes
    tensors: tuple[np.ndarray, ...]

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return len(self.data) + sum(one.nbytes for one in self.tensors)


@dataclass(frozen=True, slots=True)
class _TensorReference:
    """The place in the pickle of a tensor in `SerializedObject.tensors`."""

    index: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    is_parameter: bool
    on_cpu: bool


BY_VALUE = object()
"""Returned by the `reduce` argument of `pack` for a function to be sent with its code, whatever its name."""
Reducer = Callable[[Any], Any]
Referrer = Callable[[Any], Any]


class _Packer(cloudpickle.CloudPickler):
    def __init__(self, file: io.BytesIO, refer: Referrer, reduce: Reducer) -> None:
        super().__init__(file, protocol=5)
        self.tensors: list[np.ndarray] = []
        self._refer = refer
        self._reduce = reduce
        # By id, with the object, so that no other can get its id.
        self._references: dict[int, tuple[_TensorReference, Tensor]] = {}
        self._cells: dict[int, tuple[CellType, CellType]] = {}

    def persistent_id(self, value: Any) -> Any:
        reference = self._refer(value)
        if reference is not None:
            return reference
        if type(value) in (Tensor, torch.nn.Parameter) and value.layout == torch.strided:
            return self._tensor_reference(value)
        return None

    def reducer_override(self, value: Any) -> Any:
        reduced = self._reduce(value)
        if reduced is BY_VALUE:
            return self._dynamic_function_reduce(value)
        return super().reducer_override(value) if reduced is NotImplemented else reduced

    def _dynamic_function_reduce(self, function: FunctionType) -> Any:
        """As Ray's, but functions that share a variable of the function around them (`nonlocal`) share it there too.

        Ray's gives each function a cell of its own, with the same content at first.
        """
        make, arguments, *rest = super()._dynamic_function_reduce(function)
        if function.__closure__:
            arguments = (*arguments[:-1], tuple(map(self._cell, function.__closure__)))
        return make, arguments, *rest

    def _cell(self, cell: CellType) -> CellType:
        """Return an empty cell, always the same one for `cell`. The function's state fills it."""
        return self._cells.setdefault(id(cell), (CellType(), cell))[0]

    def _tensor_reference(self, value: Tensor) -> _TensorReference:
        if id(value) not in self._references:
            is_parameter, on_cpu = isinstance(value, torch.nn.Parameter), value.device.type == "cpu"
            reference = _TensorReference(len(self.tensors), value.dtype, tuple(value.shape), is_parameter, on_cpu)
            self.tensors.append(as_bytes(value))
            self._references[id(value)] = reference, value
        return self._references[id(value)][0]


class _Unpacker(pickle.Unpickler):
    def __init__(
        self, serialized: SerializedObject, resolve: Callable[[Any], Any], device: torch.device, copies: bool
    ) -> None:
        super().__init__(io.BytesIO(serialized.data))
        self._tensors = serialized.tensors
        self._resolve = resolve
        self._device = device
        self._copies = copies
        self._made: dict[int, Tensor] = {}

    def persistent_load(self, reference: Any) -> Any:
        if not isinstance(reference, _TensorReference):
            return self._resolve(reference)
        if reference.index not in self._made:
            value = from_bytes(self._tensors[reference.index], reference.dtype, reference.shape)
            if not reference.on_cpu:
                value = value.to(self._device, copy=True)
            elif self._copies:
                # PyTorch counts writes to those that are made outside of inference mode, in every mode.
                with torch.inference_mode(reference.is_parameter and torch.is_inference_mode_enabled()):
                    value = value.clone()
            if reference.is_parameter:
                value = torch.nn.Parameter(value, requires_grad=False)
            self._made[reference.index] = value
        return self._made[reference.index]


def pack(value: Any, refer: Referrer, reduce: Reducer = lambda _: NotImplemented) -> SerializedObject:
    """Serialize an object.

    `refer(item)` returns a reference for an object that the other process has, else None. `reduce` is as
    `pickle.Pickler.reducer_override`, or returns BY_VALUE. Raises what pickling raises for objects that it does not
    support, and what `refer` and `reduce` raise.
    """
    file = io.BytesIO()
    packer = _Packer(file, refer, reduce)
    packer.dump(value)
    return SerializedObject(file.getvalue(), tuple(packer.tensors))


def unpack(
    serialized: SerializedObject, resolve: Callable[[Any], Any], device: torch.device, copies: bool = True
) -> Any:
    """Deserialize an object. `resolve` returns this process's object for a reference that `refer` returned.

    Tensors that were on the CPU are on the CPU, others on `device`. Without `copies` those on the CPU are in memory
    that is shared with other workers and must not be written to.
    """
    return _Unpacker(serialized, resolve, device, copies).load()


@contextmanager
def by_value(modules: Iterable[ModuleType]) -> Iterator[None]:
    """Send classes and functions of these modules with their code: the other process cannot import them."""
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
    """Return the elements of a tensor of any shape and dtype as (bytes,) uint8 on the CPU."""
    flat = value.detach().cpu().resolve_conj().resolve_neg().reshape(-1)
    if flat.stride(0) != 1:  # also for one expanded element, which PyTorch considers contiguous
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy()


def from_bytes(data: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor of `as_bytes`, on the CPU, in the memory of `data`, which may be read-only."""
    if data.size == 0:  # has no memory to be viewed as another dtype
        return torch.empty(shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writ.*able")
        return torch.from_numpy(data).view(dtype).view(shape)
