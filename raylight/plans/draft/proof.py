"""The proof of a draft: the output of the split model against that of the whole one, and what a proof holds for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .local import local_difference
from .record import tensors

# Relative L2 of the difference in 16 bits, and its maximum over the standard deviation in float32.
LIMIT_16 = 1e-2
LIMIT_32 = 1e-4
# Models of many layers round by more than that in 16 bits. What is measured of one is allowed a bit more than once, as
# other kernels round a bit more or less, up to what an image would show.
LIMIT_MEASURED = 3e-2
_MARGIN = 1.3


Measure = Callable[[Tensor, Tensor, Any], float]


def difference(whole: Any, split: Any, in_16_bits: bool = False, rounding: Any = None) -> float:
    """Return the difference of two outputs, tensors or lists of them, as a share of what is allowed: 1 is the limit.

    It is infinite for outputs of different shapes, or where one is not finite. `in_16_bits`: they were computed so,
    whatever their dtype is. `rounding`: another whole output, that differs from `whole` by rounding only. In 16 bits it
    says how much that is, at each place and on the whole; without it, right outputs of some models are over the limit.
    """
    overall = _largest(functools.partial(_overall, in_16_bits), 0.0, whole, split, rounding)
    if overall == float("inf"):
        return overall
    return _largest(functools.partial(_local, in_16_bits), overall, whole, split, rounding)


def may_be_rounding(whole: Any, split: Any) -> bool:
    """Return whether outputs that were computed in 16 bits and are over the limit may be within it once the rounding of
    the model is measured.
    """
    return _largest(functools.partial(_overall, True), 0.0, whole, split, None) * LIMIT_16 <= LIMIT_MEASURED


def _largest(measure: Measure, least: float, whole: Any, split: Any, third: Any) -> float:
    """Return the largest measure of all tensors, at least `least`."""
    if isinstance(whole, Tensor):
        return max(least, measure(whole, split, third)) if isinstance(split, Tensor) else float("inf")
    if not isinstance(whole, (list, tuple)):
        return least if type(whole) is type(split) else float("inf")
    thirds = [None] * len(whole) if third is None else third
    if not all(isinstance(one, (list, tuple)) and len(one) == len(whole) for one in (split, thirds)):
        return float("inf")
    for items in zip(whole, split, thirds, strict=True):
        least = max(least, _largest(measure, least, *items))
    return least


def _overall(in_16_bits: bool, whole: Tensor, split: Tensor, rounded: Any) -> float:
    """Return the difference of all values of an output, without a look at where it is."""
    if whole.shape != split.shape or whole.dtype != split.dtype:
        return float("inf")
    if whole.numel() == 0 or not whole.is_floating_point():
        return 0.0 if torch.equal(whole, split) else float("inf")
    expected, delta = whole.float(), (split.float() - whole.float())
    if not bool(torch.isfinite(delta).all()):
        return float("inf")
    if not _is_rounded(whole, in_16_bits):
        return _share(delta.abs().max(), expected.std(correction=0), LIMIT_32)
    norm, limit = expected.norm(), LIMIT_16
    if rounded is not None:
        if not (isinstance(rounded, Tensor) and rounded.shape == whole.shape and bool(torch.isfinite(rounded).all())):
            return float("inf")
        measured = _share((rounded.float() - expected).norm(), norm, 1.0)
        limit = min(max(LIMIT_16, _MARGIN * measured), LIMIT_MEASURED)
    return _share(delta.norm(), norm, limit)


def _local(in_16_bits: bool, whole: Tensor, split: Tensor, rounded: Any) -> float:
    """Return the difference at the place where it is largest. `_overall` is finite."""
    if whole.numel() == 0 or not whole.is_floating_point() or not _is_rounded(whole, in_16_bits):
        return 0.0  # as `_overall` looks at every value
    expected = whole.float()
    rounding = None if rounded is None else rounded.float() - expected
    return local_difference(expected, split.float() - expected, torch.finfo(whole.dtype).eps, rounding)


def _is_rounded(output: Tensor, in_16_bits: bool) -> bool:
    return output.itemsize <= 2 or in_16_bits


def _share(error: Tensor, scale: Tensor, limit: float) -> float:
    """Return how much of the limit an error is. An output of zeros must be equal."""
    allowed = float(scale) * limit
    return float(error) / allowed if allowed else float("inf") if float(error) else 0.0


def is_in_16_bits(value: Any) -> bool:
    """Return whether the first tensor of floating point in the arguments of a forward has 16 bits: the latent, which
    ComfyUI passes in the dtype that a model computes in.
    """
    first = next((tensor for _, tensor in tensors("", value) if tensor.is_floating_point()), None)
    return first is not None and first.itemsize <= 2


_BY_VALUE = (int, bool, str, type(None))


def signature(value: Any, name: str = "") -> Any:
    """Return what of the arguments of a forward decides how it is split: shapes and dtypes of tensors, flags and names,
    and whether a mask is the same everywhere: one without effect proves nothing of one that has any.

    Forwards of one signature have the same numbers of tokens in all streams, so a proof of one holds for the others.
    """
    if isinstance(value, Tensor):
        shape = (str(value.dtype).removeprefix("torch."), *value.shape)
        return (*shape, _is_uniform(value)) if value.dtype == torch.bool or "mask" in name.lower() else shape
    if isinstance(value, Mapping):
        return tuple(
            (str(key), signature(item, str(key))) for key, item in sorted(value.items(), key=lambda item: str(item[0]))
        )
    if isinstance(value, (list, tuple)):
        return tuple(signature(item, name) for item in value)
    return value if isinstance(value, _BY_VALUE) else type(value).__name__


def _is_uniform(mask: Tensor) -> bool:
    return mask.numel() == 0 or bool((mask == mask.flatten()[0]).all())
