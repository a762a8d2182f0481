"""A weight that stays in its file until it goes to a GPU, whatever dtype the model needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .lazy_concat import LazyConcat
from .staged_read import copy_weight

_ATEN = torch.ops.aten
_CPU = torch.device("cpu")

Pieces = list[tuple[int, Tensor]]
"""(first row, plain tensor of the file), in the order in which they are written over each other."""


class FileWeight(Tensor):
    """A tensor (rows, ...) on the CPU, of the dtype and size that the model accounts for, without memory of its own.

    To copy it to a device reads it from the file, in the file's dtype, and converts it there, through the dtypes
    `stored_as` and its own. Rows of it are another such tensor. Any other operation reads it into memory of the CPU for
    as long as the operation takes; one that writes to it, for the life of the tensor.
    """

    @staticmethod
    def __new__(
        cls, pieces: Pieces, shape: Sequence[int], dtype: torch.dtype, stored_as: torch.dtype, start: int = 0
    ) -> FileWeight:
        return Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=_CPU)

    def __init__(
        self, pieces: Pieces, shape: Sequence[int], dtype: torch.dtype, stored_as: torch.dtype, start: int = 0
    ) -> None:
        # `start` is the row of the pieces that is row 0 here. What was written, all aliases share.
        self._pieces, self._stored_as, self._start = pieces, stored_as, start
        self._written: list[Tensor] = []

    @classmethod
    def of(cls, weight: Tensor, dtype: torch.dtype) -> FileWeight:
        """Return a weight of a file, plain or joined, in another dtype or the same."""
        if isinstance(weight, FileWeight):
            return FileWeight(weight._pieces, weight.shape, dtype, weight._stored_as, weight._start)
        pieces = weight.pieces if isinstance(weight, LazyConcat) else [(0, weight.detach())]
        return FileWeight(pieces, weight.shape, dtype, weight.dtype)

    @property
    def file_tensors(self) -> list[Tensor]:
        """The tensors of the file that it is read from; they may have other rows too."""
        return [piece for _, piece in self._pieces]

    @property
    def file_bytes(self) -> int:
        """How many bytes of the file a copy reads."""
        return sum(piece.nbytes for _, piece in self._parts())

    def read_into(self, destination: Tensor) -> None:
        """Fill a tensor of the same shape, on any device, of any dtype. Raises as `copy_weight`."""
        if self._written:
            destination.copy_(self._written[0])
            return
        steps = [self._stored_as, self.dtype, destination.dtype]
        for row, piece in self._parts():
            rows = destination if piece.ndim == 0 else destination[row : row + piece.shape[0]]
            copy_weight(piece, rows, _through(piece.dtype, steps))

    def read(self, device: torch.device = _CPU, dtype: torch.dtype | None = None) -> Tensor:
        """Return a plain tensor with memory of its own. Raises as `copy_weight`."""
        found = torch.empty(self.shape, dtype=dtype or self.dtype, device=device)
        self.read_into(found)
        return found

    def numpy(self, *, force: bool = False) -> Any:
        """Return its values as an array of NumPy."""
        return self.read().numpy(force=force)

    def tolist(self) -> Any:
        """Return its values as numbers of Python."""
        return self.read().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = self._written[0].clone() if self._written else FileWeight.of(self, self.dtype)
        return torch.nn.Parameter(copied, False) if isinstance(self, torch.nn.Parameter) else copied

    def _parts(self) -> Pieces:
        """Return what these rows have of the pieces, by row here."""
        if self.ndim == 0:
            return self._pieces
        parts = []
        for at, piece in self._pieces:
            first = max(self._start, at)
            last = min(self._start + self.shape[0], at + piece.shape[0])
            if first < last:
                parts.append((first - self._start, piece[first - at : last - at]))
        return parts

    def rows(self, start: int, stop: int) -> FileWeight:
        """Return the rows `start` to `stop` of it, as the file has them."""
        shape = (max(0, stop - start), *self.shape[1:])
        return FileWeight(self._pieces, shape, self.dtype, self._stored_as, self._start + start)

    def _alias(self) -> FileWeight:
        alias = FileWeight.of(self, self.dtype)
        alias._written = self._written
        return alias

    def _to_write(self) -> Tensor:
        if not self._written:
            self._written.append(self.read())
        return self._written[0]

    def _plain(self) -> Tensor:
        """Return its values to an operation that does not change them, without a copy where the file has them so."""
        if self._written:
            return self._written[0]
        parts = self._parts()
        if len(parts) == 1 and parts[0][1].shape == self.shape and parts[0][1].dtype == self.dtype == self._stored_as:
            return parts[0][1]
        return self.read()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        special = _SPECIAL.get(func)
        if special is not None and (found := special(*args, **kwargs)) is not NotImplemented:
            return found
        # In inference mode operations arrive whole that consist of others, as `to`.
        if (found := func.decompose(*args, **kwargs)) is not NotImplemented:
            return found
        return _on_values(func, args, kwargs)


def _through(stored: torch.dtype, steps: Sequence[torch.dtype]) -> list[torch.dtype]:
    """Return the dtypes that lie between that of a piece and the last of `steps`."""
    between = []
    for dtype in steps:
        if dtype != (between[-1] if between else stored):
            between.append(dtype)
    return between[:-1]


def _on_values(func: Any, args: Any, kwargs: Any) -> Any:
    """Call an operation with the values of file weights, and return the weights in place of values that it changed."""
    changed: dict[int, FileWeight] = {}

    def values(argument: Any) -> Callable[[Any], Any]:
        writes = argument.alias_info is not None and argument.alias_info.is_write

        def of(value: Any) -> Any:
            if not isinstance(value, FileWeight):
                return value
            if not writes:
                return value._plain()
            changed[id(value._to_write())] = value
            return value._to_write()

        return of

    arguments = func._schema.arguments
    by_name = {argument.name: argument for argument in arguments}
    args = [tree_map(values(argument), value) for argument, value in zip(arguments, args, strict=False)]
    kwargs = {name: tree_map(values(by_name[name]), value) for name, value in kwargs.items()}
    return tree_map(lambda result: changed.get(id(result), result), func(*args, **kwargs))


def _copied_to(weight: FileWeight, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return weight.read(torch.device(device or _CPU), dtype)


def _copy_into(destination: Tensor, source: Tensor, non_blocking: bool = False) -> Any:
    plain = type(destination) in (Tensor, torch.nn.Parameter)
    if not plain or not isinstance(source, FileWeight) or destination.shape != source.shape:
        return NotImplemented
    source.read_into(destination)
    return destination


def _rows(weight: FileWeight, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    if dim != 0 or step != 1 or weight._written:
        return NotImplemented
    first, last, _ = slice(start, end).indices(weight.shape[0])
    return weight.rows(first, last)


def _empty_like(weight: FileWeight, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return torch.empty(weight.shape, dtype=dtype or weight.dtype, device=device or _CPU)


# What does not need the values in memory of the CPU.
_SPECIAL: dict[Any, Callable[..., Any]] = {
    _ATEN.detach.default: FileWeight._alias,
    _ATEN.alias.default: FileWeight._alias,
    _ATEN._to_copy.default: _copied_to,
    _ATEN.clone.default: _copied_to,
    _ATEN.copy_.default: _copy_into,
    _ATEN.slice.Tensor: _rows,
    _ATEN.empty_like.default: _empty_like,
}
