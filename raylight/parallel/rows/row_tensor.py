"""A tensor that knows which rows of the whole it has, and takes each operation to the rule that follows them.

Model code runs unchanged: PyTorch gives every operation that a `RowTensor` is in to `__torch_function__`, and the rule
of that name computes this rank's rows of the result. What has no rule raises `RowsError`, so nothing that looks at
other rows is ever computed from this rank's alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .layout import Rows

Rule = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
RULES: dict[str, Rule] = {}


_SHAPE, _DEVICE, _DTYPE = (cast("Any", of).__get__ for of in (Tensor.shape, Tensor.device, Tensor.dtype))


class RowsError(RuntimeError):
    """An operation that cannot be followed by rows."""


@dataclass(slots=True)
class RowGroup:
    """The ranks of `group`, over which rows are split, and what this one, `rank`, has done.

    `received_bytes` came from other ranks in `exchanges`; convolutions had `convolved_rows` as input here, halos
    included, of `convolved_of` on all ranks. With `channels_last`, images that are convolved in 16 bits on a GPU are
    kept in the order in which cuDNN computes, (B, H, W, C), instead of converted around each convolution. From
    `hides_halos_from` bytes of input a rank, a convolution computes while its halo is on the way, and its edges again;
    else it waits. Tests set `orders_any`, so that `channels_last` is in any dtype and on any device.
    """

    group: dist.ProcessGroup
    ranks: int
    rank: int
    channels_last: bool = False
    orders_any: bool = False
    hides_halos_from: float = 0
    received_bytes: int = 0
    exchanges: int = 0
    convolved_rows: int = 0
    convolved_of: int = 0


class RowTensor(Tensor):
    """The rows of a tensor that this rank has: its shape is theirs, and `rows` says which of the whole they are."""

    rows: Rows
    ranks: RowGroup

    # Models ask for these more often than they compute, and the way through `__torch_function__` takes ten times as
    # long: about 0.2 s of a video's decode.
    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """The shape of this rank's rows."""
        with torch._C.DisableTorchFunction():
            return _SHAPE(self)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The device."""
        with torch._C.DisableTorchFunction():
            return _DEVICE(self)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """The dtype."""
        with torch._C.DisableTorchFunction():
            return _DTYPE(self)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = func.__name__
        if name in ("__get__", "__set__"):  # an attribute, such as `shape`
            name = func.__self__.__name__ + ("" if name == "__get__" else "=")
        rule = RULES.get(name)
        if rule is None:
            raise RowsError(f"the operation '{name}' cannot be followed by rows")
        with _MemoryToldApart(), torch._C.DisableTorchFunctionSubclass():
            return rule(func, args, dict(kwargs or {}))


class _MemoryToldApart:
    """Raise MemoryError for PyTorch's own error: models catch that one and try in another way, with collectives in
    which no other rank is. A class, as a generator's context takes several times as long.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        if kind is not None and isinstance(error, torch.OutOfMemoryError):
            raise MemoryError(str(error)) from error


def followed_as_one(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of a module that computes each row of its first argument, whatever it is, from that row alone
    and takes no other tensor: its operations are not followed one by one.
    """

    @wraps(forward)
    def follow(x: Tensor) -> Tensor:
        if not isinstance(x, RowTensor):
            return forward(x)
        rows, ranks = x.rows, x.ranks
        with _MemoryToldApart(), torch._C.DisableTorchFunction():
            return wrap(forward(x.as_subclass(Tensor)), rows, ranks)

    return follow


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of operations of these names; methods, functions and operators share one."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def wrap(local: Tensor, rows: Rows, ranks: RowGroup) -> RowTensor:
    """Return `local`, this rank's rows, as a RowTensor that shares its memory."""
    result = local.as_subclass(RowTensor)
    result.rows, result.ranks = rows, ranks
    return result


def plain(tensor: Tensor) -> Tensor:
    """Return a RowTensor's local rows as an ordinary tensor that shares its memory."""
    return tensor.as_subclass(Tensor) if isinstance(tensor, RowTensor) else tensor


def row_tensors(values: Any) -> Iterator[RowTensor]:
    """Yield each RowTensor among nested arguments."""
    if isinstance(values, RowTensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from row_tensors(value)
    elif isinstance(values, dict):
        yield from row_tensors(list(values.values()))


def position(rows: Rows, tensor: Tensor) -> int:
    """Return the dimension of `rows` in `tensor`, counted from 0."""
    return tensor.ndim + rows.dim


def local_rows(tensor: RowTensor) -> int:
    """Return how many rows this rank's tensor has."""
    start, stop = tensor.rows.spans[tensor.ranks.rank]
    return stop - start


def mixes(name: str, tensor: RowTensor, why: str) -> RowsError:
    """Return the error for an operation on `tensor` that would mix rows of several ranks."""
    return RowsError(f"'{name}' of a tensor {tuple(tensor.shape)} with rows along dim {tensor.rows.dim}: {why}")
