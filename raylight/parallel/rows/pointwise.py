"""Operations that compute each element from the elements at the same place: every rank does its rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .exchange import realigned
from .layout import Rows
from .row_tensor import RowsError, RowTensor, mixes, row_tensors, rule, wrap

# Attributes and questions whose answer is about this rank's tensor.
ABOUT = (
    "shape dtype device ndim layout is_cuda is_cpu is_meta is_sparse is_quantized is_nested is_mps is_xpu "
    "requires_grad requires_grad= grad grad_fn names itemsize size dim ndimension stride storage_offset is_contiguous "
    "element_size is_floating_point is_complex is_inference is_shared get_device __len__ __hash__ __repr__ __format__ "
    "is_tensor _version"
).split()

POINTWISE = (
    "abs add sub subtract mul multiply div divide true_divide floor_divide rsub pow rpow sqrt rsqrt square exp expm1 "
    "log log1p sin cos tanh sigmoid erf reciprocal neg sign round floor ceil maximum minimum clamp clip clamp_min "
    "clamp_max silu relu relu6 leaky_relu gelu elu softplus mish hardtanh hardswish hardsigmoid logsigmoid tanhshrink "
    "addcmul addcdiv lerp where nan_to_num isnan isfinite eq ne lt le gt ge logical_not logical_and logical_or "
    "to type type_as float half bfloat16 double cpu cuda clone contiguous detach dropout alpha_dropout "
    "copy_ zero_ fill_ zeros_like ones_like full_like empty_like masked_fill iadd isub imul itruediv idiv truediv "
    "radd rmul rtruediv rdiv stochastic_depth"
).split()

CONSTANT = "_raylight_same_in_all_rows"  # marks ordinary tensors


def mark_constant(tensor: Tensor) -> Tensor:
    """Mark an ordinary tensor as the same in all of its rows, whichever dimension those are."""
    setattr(tensor, CONSTANT, True)
    return tensor


@rule(*ABOUT)
def about(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answer for this rank's rows."""
    return func(*args, **kwargs)


@rule("numel", "nelement")
def numel(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the number of elements on all ranks: what a model decides by size, all ranks decide alike."""
    tensor: RowTensor = args[0]
    return tensor.numel() // tensor.shape[tensor.rows.dim] * tensor.rows.cuts.total * tensor.rows.outer


def aligned(name: str, values: Any, rows: Rows, local: int) -> Any:
    """Return nested arguments with each RowTensor cut as `rows`, of which this rank has `local` elements.

    Raises RowsError: an ordinary tensor has rows of its own, which may be of the whole image.
    """
    if isinstance(values, RowTensor):
        if values.rows is rows:
            return values
        if values.rows.dim != rows.dim:
            raise mixes(name, values, f"beside a tensor with rows along dim {rows.dim}")
        return realigned(values, rows)
    if isinstance(values, Tensor):
        size = values.shape[rows.dim] if values.ndim >= -rows.dim else 1
        if size == 1 or 0 in values.shape or (size == local and hasattr(values, CONSTANT)):
            return values
        raise RowsError(f"'{name}' of rows along dim {rows.dim} and an ordinary tensor {tuple(values.shape)}")
    if isinstance(values, (list, tuple)):
        return type(values)(aligned(name, value, rows, local) for value in values)
    return values


def _first(values: Any) -> RowTensor:
    return next(row_tensors(values))


def pointwise(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute this rank's rows from this rank's rows."""
    name = func.__name__
    lead = args[0] if args and isinstance(args[0], RowTensor) else _first((args, kwargs))
    rows, ranks = lead.rows, lead.ranks
    local = lead.shape[rows.dim]
    args = tuple(arg if arg is lead else aligned(name, arg, rows, local) for arg in args)
    if kwargs:
        kwargs = {key: aligned(name, value, rows, local) for key, value in kwargs.items()}
    result = func(*args, **kwargs)
    return wrap(result, rows, ranks) if isinstance(result, Tensor) else result


def _spellings(name: str) -> list[str]:
    """Return the names by which PyTorch has an operation: function, in place, operator and reflected operator."""
    return [name] if name.endswith("_") else [name, f"{name}_", f"__{name}__", f"__r{name}__", f"__i{name}__"]


rule(*(spelling for name in POINTWISE for spelling in _spellings(name)))(pointwise)


@rule("rand_like", "randn_like")
def random_like(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Draw the whole tensor on every rank, so that generators stay alike, and keep this rank's rows."""
    tensor: RowTensor = args[0]
    rows = tensor.rows
    if rows.outer > 1:
        raise mixes(func.__name__, tensor, "its rows are flattened together with other dimensions")
    shape = list(tensor.shape)
    shape[rows.dim] = rows.cuts.total
    full = func(torch.empty(shape, dtype=tensor.dtype, device=tensor.device), *args[1:], **kwargs)
    start, stop = rows.spans[tensor.ranks.rank]
    return wrap(full.narrow(rows.dim, start, stop - start), rows, tensor.ranks)


@rule("new_empty", "new_zeros", "new_ones", "new_full")
def new_constant(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Make an ordinary tensor that is the same in all rows."""
    return mark_constant(func(*args, **kwargs))
