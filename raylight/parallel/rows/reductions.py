"""Operations along dimensions: sums, norms, softmax, linear layers and products of matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..heartbeat import beat
from .exchange import gathered, own
from .row_tensor import RowTensor, mixes, plain, position, row_tensors, rule, wrap


def _dims(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], place: int) -> tuple[int, ...]:
    """Return the dimensions, counted from 0, that an operation is along; all if none is given."""
    tensor: RowTensor = args[0]
    dims = args[place] if len(args) > place else kwargs.get("dim", kwargs.get("axis"))
    if dims is None:
        return tuple(range(tensor.ndim))
    return tuple(dim % tensor.ndim for dim in (dims if isinstance(dims, (list, tuple)) else (dims,)))


@rule("sum", "mean", "amax", "amin", "var", "std", "norm", "prod", "vector_norm", "linalg_vector_norm")
def reduce(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Reduce dimensions: locally if the rows are not among them, else a mean or a sum over all ranks."""
    name = func.__name__
    tensor: RowTensor = args[0]
    dims = _dims(name, args, kwargs, 2 if "norm" in name else 1)
    place = position(tensor.rows, tensor)
    keep = kwargs.get("keepdim", next((arg for arg in args[1:] if isinstance(arg, bool)), False))
    if place not in dims:
        gone = 0 if keep else sum(dim > place for dim in dims)
        return wrap(func(*args, **kwargs), replace(tensor.rows, dim=tensor.rows.dim + gone), tensor.ranks)
    if name not in ("sum", "mean"):
        raise mixes(name, tensor, "it is along the rows")
    local = own(tensor)
    result = plain(local).float().sum(dims, keepdim=keep)
    _sum_over_ranks(result, tensor)
    if name == "mean":
        count = tensor.rows.cuts.total * tensor.rows.outer
        for dim in dims:
            count *= 1 if dim == place else tensor.shape[dim]
        result = result / count
    return result.to(tensor.dtype)


def _sum_over_ranks(values: Tensor, tensor: RowTensor) -> None:
    beat()
    dist.all_reduce(values, group=tensor.ranks.group)
    tensor.ranks.exchanges += 1
    tensor.ranks.received_bytes += values.numel() * values.element_size()


@rule("adaptive_avg_pool2d", "adaptive_avg_pool3d")
def adaptive_pool(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Take the mean of the whole picture."""
    tensor: RowTensor = args[0]
    size = args[1] if len(args) > 1 else kwargs["output_size"]
    spatial = int(func.__name__[-2])
    if any(one != 1 for one in (size if isinstance(size, (list, tuple)) else (size,))):
        raise mixes(func.__name__, tensor, f"to a size of {size}")
    return reduce(Tensor.mean, (tensor, tuple(range(-spatial, 0))), {"keepdim": True})


@rule("normalize", "softmax", "log_softmax", "cumsum", "flip", "sort", "argsort", "roll")
def along(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Compute along a dimension other than the rows."""
    tensor: RowTensor = args[0]
    name = func.__name__
    places = {"normalize": 2, "roll": 2}
    default = {"dim": 1} if name == "normalize" else {}
    dims = _dims(name, args, {**default, **kwargs, "axis": kwargs.get("dims")}, places.get(name, 1))
    if position(tensor.rows, tensor) in dims:
        raise mixes(name, tensor, "it is along the rows")
    return wrap(func(*args, **kwargs), tensor.rows, tensor.ranks)


@rule("layer_norm", "rms_norm")
def last_dims_norm(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Normalize over the last dimensions, among which rows are not."""
    tensor: RowTensor = args[0]
    shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
    if len(shape) >= -tensor.rows.dim:
        raise mixes(func.__name__, tensor, "it is along the rows")
    return wrap(func(*args, **kwargs), tensor.rows, tensor.ranks)


@rule("tril", "triu")
def triangle(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Keep a triangle of matrices, in which rows are not."""
    tensor: RowTensor = args[0]
    if tensor.rows.dim >= -2:
        raise mixes(func.__name__, tensor, "it is along the rows")
    return wrap(func(*args, **kwargs), tensor.rows, tensor.ranks)


@rule("baddbmm", "avg_pool1d")
def batched(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Compute each matrix or line of a batch, in which the rows are, by itself."""
    lead = next(row_tensors([args, kwargs]))
    for tensor in row_tensors([args, kwargs]):
        if position(tensor.rows, tensor) != 0 or tensor.rows != lead.rows:
            raise mixes(func.__name__, tensor, "its rows are not the batch")
    return wrap(func(*args, **kwargs), lead.rows, lead.ranks)


@rule("linear")
def linear(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Apply a linear layer to the last dimension, which is not the rows."""
    tensor: RowTensor = args[0]
    if tensor.rows.dim == -1:
        raise mixes("linear", tensor, "it is along the rows")
    return wrap(func(*args, **kwargs), tensor.rows, tensor.ranks)


@rule("bmm", "matmul", "__matmul__")
def matmul(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Multiply matrices, (..., M, K) by (..., K, N), of equal leading dimensions.

    Rows along M or N stay where they are in the result; the other factor is gathered where it has rows along K or along
    the other of the two. Queries by keys and values by weights, so written, are attention over all tokens.
    """
    left, right = args
    for side in (left, right):
        if isinstance(side, RowTensor) and (side.rows.dim < -2 or side.rows.held is not None):
            if not all(isinstance(one, RowTensor) and one.rows == side.rows for one in args):
                raise mixes(func.__name__, side, "beside another batch")
            return wrap(func(*args, **kwargs), side.rows, side.ranks)
    # Keys and values are what is gathered: the left factor if the right one has rows along N of weights (K, N).
    if isinstance(left, RowTensor) and left.rows.dim == -1:
        left = gathered(left)
    if isinstance(right, RowTensor) and (right.rows.dim == -2 or isinstance(left, RowTensor)):
        right = gathered(right)
    lead = left if isinstance(left, RowTensor) else right
    result = func(left, right, **kwargs)
    if not isinstance(lead, RowTensor):
        return result
    return wrap(result, replace(lead.rows, dim=-2 if lead is left else -1), lead.ranks)


@rule("scaled_dot_product_attention")
def attention(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Attend over all tokens, (B, H, S, D): this rank's queries with the keys and values of all ranks.

    Where the rows are in the batch, as when frames attend to each other at each place, nothing is exchanged.
    """
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    query, key, value = given.pop("query"), given.pop("key"), given.pop("value")
    rows = query.rows
    if not all(isinstance(one, RowTensor) and one.rows == rows for one in (query, key, value)) or rows.dim == -1:
        raise mixes("attention", query, "its keys and values have other rows")
    if rows.dim == -2:
        if given.get("attn_mask") is not None or given.get("is_causal"):
            raise mixes("attention", query, "it has a mask")
        # One collective for both.
        both = wrap(torch.cat([key, value], -1), rows, query.ranks)
        key, value = gathered(both).split([key.shape[-1], value.shape[-1]], -1)
    elif isinstance(given.get("attn_mask"), RowTensor):
        raise mixes("attention", query, "its mask has rows")
    return wrap(func(query, key, value, **given), rows, query.ranks)
