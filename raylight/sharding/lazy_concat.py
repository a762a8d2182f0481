"""A tensor that concatenates others along dim 0 only when its rows are read.

Some files have query, key and value apart, and the model has them in one weight. With a lazy concatenation a rank reads
only the rows that it needs from the file, and no rank makes the full weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class LazyConcat(Tensor):
    """A tensor (rows, ...) on the CPU: takes slices of dim 0 by assignment, returns them by indexing, and no more."""

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], dtype: torch.dtype, pieces: list[tuple[int, Tensor]] | None = None, start: int = 0
    ) -> LazyConcat:
        return Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=torch.device("cpu"))

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, pieces: list[tuple[int, Tensor]] | None = None, start: int = 0
    ) -> None:
        # Views of one tensor share the list of (first row, piece); `start` is the row of it that is row 0 here.
        self._pieces = [] if pieces is None else pieces
        self._start = start

    def narrow(self, dim: int, start: int, length: int) -> LazyConcat:
        """Return a view of the rows `start` to `start + length`.

        Raises NotImplementedError: for a `dim` other than 0.
        """
        if dim != 0:
            raise NotImplementedError(f"rows are concatenated along dim 0, not {dim}")
        return LazyConcat((length, *self.shape[1:]), self.dtype, self._pieces, self._start + start)

    def __setitem__(self, index: slice, value: Tensor) -> None:
        start, stop, _ = index.indices(self.shape[0])
        if value.shape[0] != stop - start or value.shape[1:] != self.shape[1:]:
            raise ValueError(
                f"rows of shape {tuple(value.shape)} do not fit into {stop - start} of {tuple(self.shape)}"
            )
        if isinstance(value, LazyConcat):
            self._pieces.extend((self._start + start + at - value._start, piece) for at, piece in value._pieces)
        else:
            self._pieces.append((self._start + start, value))

    def __getitem__(self, index: slice | EllipsisType) -> Tensor:
        start, stop, _ = (slice(None) if index is ... else index).indices(self.shape[0])
        rows = torch.empty(max(0, stop - start), *self.shape[1:], dtype=self.dtype)
        for at, piece in self._pieces:
            first, last = max(start, at - self._start), min(stop, at - self._start + piece.shape[0])
            if first < last:
                offset = self._start - at
                rows[first - start : last - start] = piece[first + offset : last + offset]
        return rows

    @property
    def pieces(self) -> list[tuple[int, Tensor]]:
        """What was assigned, in this order, and the rows here where it begins; it may have more rows than there are."""
        return [(at - self._start, piece) for at, piece in self._pieces]

    @property
    def is_complete(self) -> bool:
        """Return whether every row was assigned."""
        covered = torch.zeros(self.shape[0], dtype=torch.bool)
        for at, piece in self._pieces:
            covered[max(0, at - self._start) : max(0, at - self._start + piece.shape[0])] = True
        return bool(covered.all())

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            lazy = args[0]
            return LazyConcat(lazy.shape, lazy.dtype, lazy._pieces, lazy._start)
        raise NotImplementedError(f"{func} of rows that are still in their file")


class LazyConcatMode(TorchFunctionMode):
    """Have `torch.empty` and `torch.empty_like` return a `LazyConcat`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty_like:
            return LazyConcat(args[0].shape, args[0].dtype)
        if func is torch.empty:
            return LazyConcat(args[0], kwargs["dtype"])
        return func(*args, **kwargs)
