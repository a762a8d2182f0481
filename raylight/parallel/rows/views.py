"""Operations that move dimensions, take parts along others than the rows, or join tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from .exchange import own
from .layout import Rows
from .pointwise import aligned, pointwise
from .row_tensor import RowsError, RowTensor, local_rows, mixes, plain, position, row_tensors, rule, wrap

# Tells the dimension of rows after a view has moved it: the other strides of the probe are 0.
STRIDE = 7919
# A model takes few kinds of views, over and over.
KEPT = 4096
_known: dict[Any, tuple[int, ...]] = {}


def _found(name: str, probe: Tensor, size: int, tensor: RowTensor) -> int:
    """Return the dimension of rows in a view of a probe, counted from the end."""
    places = [dim for dim in range(probe.ndim) if probe.stride(dim) == STRIDE]
    if len(places) != 1 or probe.shape[places[0]] != size:
        raise mixes(name, tensor, "it takes some of this rank's rows, or only one")
    return places[0] - probe.ndim


@rule(
    *"permute transpose swapaxes swapdims movedim moveaxis unsqueeze squeeze expand narrow select chunk split".split(),
    *"split_with_sizes tensor_split unbind __getitem__ t unsqueeze_ squeeze_".split(),
)
def view(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Take a view that keeps this rank's rows whole, wherever it puts them."""
    name, tensor = func.__name__, args[0]
    if not isinstance(tensor, RowTensor) or any(row_tensors([args[1:], kwargs])):
        raise RowsError(f"'{name}' with an argument that has rows")
    key = (name, tuple(tensor.shape), tensor.rows.dim, _hashable(args[1:]), _hashable(kwargs))
    dims = _known.get(key)
    if dims is None:
        dims = _known[key] = _dims_of_rows(func, tensor, args[1:], kwargs)
        if len(_known) > KEPT:
            _known.clear()
    result = func(*args, **kwargs)
    if isinstance(result, Tensor):
        return wrap(result, _moved(tensor.rows, dims[0]), tensor.ranks)
    return type(result)(
        wrap(part, _moved(tensor.rows, dim), tensor.ranks) for part, dim in zip(result, dims, strict=True)
    )


def _moved(rows: Rows, dim: int) -> Rows:
    return rows if dim == rows.dim else replace(rows, dim=dim)


def _hashable(value: Any) -> Any:
    """Return the arguments of a view as a key; slices have no hash before Python 3.12. Raises RowsError: a tensor."""
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(item) for item in value)
    if isinstance(value, dict):
        return tuple((name, _hashable(item)) for name, item in value.items())
    if isinstance(value, Tensor):
        raise RowsError("an index that is a tensor cannot be followed by rows")
    return ("slice", value.start, value.stop, value.step) if isinstance(value, slice) else value


def _dims_of_rows(
    func: Callable[..., Any], tensor: RowTensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int, ...]:
    """Return the dimension of rows in each tensor that a view returns, by a probe without memory."""
    strides = [0] * tensor.ndim
    strides[tensor.rows.dim] = STRIDE
    size = tensor.shape[tensor.rows.dim]
    probed = func(torch.empty_strided(tuple(tensor.shape), strides, device="meta"), *args, **kwargs)
    parts = (probed,) if isinstance(probed, Tensor) else probed
    return tuple(_found(func.__name__, part, size, tensor) for part in parts)


@rule("__setitem__")
def set_item(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Write into all of this rank's rows."""
    target, index, value = args
    if not isinstance(target, RowTensor):
        raise RowsError("a tensor with rows was written into an ordinary one")
    part = view(Tensor.__getitem__, (target, index), {})
    pointwise(Tensor.copy_ if isinstance(value, Tensor) else Tensor.fill_, (part, value), {})


@rule("cat", "concat", "concatenate", "stack")
def join(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Join tensors along another dimension than the rows."""
    name = func.__name__
    tensors = args[0] if args else kwargs.pop("tensors")
    dim = args[1] if len(args) > 1 else kwargs.pop("dim", 0)
    lead = next(row_tensors(tensors))
    rows, ndim = lead.rows, lead.ndim + (name == "stack")
    pieces = [aligned(name, tensor, rows, lead.shape[rows.dim]) for tensor in tensors]
    dim = dim if dim < 0 else dim - ndim
    if name == "stack" and dim >= rows.dim:
        rows = replace(rows, dim=rows.dim - 1)
    elif dim == rows.dim:
        raise mixes(name, lead, "joined along its rows")
    return wrap(func(pieces, dim, **kwargs), rows, lead.ranks)


@rule("repeat", "tile")
def repeat(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Repeat along other dimensions than the rows."""
    tensor: RowTensor = args[0]
    times = args[1] if isinstance(args[1], (list, tuple)) else args[1:]
    if len(times) >= -tensor.rows.dim and times[tensor.rows.dim] != 1:
        raise mixes(func.__name__, tensor, "repeats its rows")
    return wrap(func(*args, **kwargs), tensor.rows, tensor.ranks)


@rule("repeat_interleave")
def repeat_interleave(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Repeat each element along a dimension; each row becomes several if that is the one of rows."""
    tensor: RowTensor = own(args[0])
    times = args[1] if len(args) > 1 else kwargs["repeats"]
    dim = args[2] if len(args) > 2 else kwargs.get("dim")
    if dim is None or not isinstance(times, int):
        raise mixes(func.__name__, tensor, "repeats not every element alike")
    rows = tensor.rows
    if dim % tensor.ndim == position(rows, tensor):
        rows = replace(rows, cuts=rows.cuts.scaled(times))
    return wrap(func(plain(tensor), times, dim), rows, tensor.ranks)


@rule("reshape", "view", "flatten", "unflatten", "view_as", "reshape_as")
def reshape(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Reshape, and find the rows again: alone, split into groups of rows, or flattened with their neighbours."""
    tensor: RowTensor = args[0]
    if func is Tensor.view:  # which a model may call on a tensor that has another order of memory here
        func = Tensor.reshape
    result = func(plain(tensor), *(plain(arg) if isinstance(arg, Tensor) else arg for arg in args[1:]), **kwargs)
    return wrap(result, reshaped(func.__name__, tensor, tuple(result.shape)), tensor.ranks)


def reshaped(name: str, tensor: RowTensor, shape: tuple[int, ...]) -> Rows:
    """Return where the rows of `tensor` are after a reshape to `shape`.

    The elements are `before` x rows x `after`, in this order, before and after. The dimension of rows is the first one
    by which the shape's leading dimensions have more than `before` elements, because each rank has several rows.

    Raises RowsError: that dimension is not made of whole rows.
    """
    rows, place = tensor.rows, position(tensor.rows, tensor)
    count = local_rows(tensor)
    before = prod(tensor.shape[:place]) * rows.outer
    after = prod(tensor.shape[place + 1 :])
    dim = next((dim for dim in range(len(shape)) if prod(shape[: dim + 1]) > before), len(shape) - 1)
    leading, size, trailing = prod(shape[:dim]), shape[dim], prod(shape[dim + 1 :])
    if count >= 2 and before % leading == 0:
        outer = before // leading
        if after % trailing == 0:  # rows, perhaps with what follows them
            return replace(rows.scaled(after // trailing), dim=dim - len(shape), outer=outer)
        group = trailing // after
        if trailing % after == 0 and outer * (count // group) == size:  # groups of rows
            return replace(rows.divided(group), dim=dim - len(shape), outer=outer)
    raise mixes(name, tensor, f"its rows are not found in {shape}")
