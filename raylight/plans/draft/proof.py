"""The proof of a draft: the output of the split model against that of the whole one, and what a proof holds for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .record import tensors

# Relative L2 of the difference in 16 bits, and its maximum over the standard deviation in float32.
LIMIT_16 = 1e-2
LIMIT_32 = 1e-4
# The norm of the difference at one position over the norm there or of an average one. It finds errors that are at the
# border of the ranks' tokens only, as a convolution makes them: the limits above are averages or for float32.
LIMIT_LOCAL = 0.1


def difference(whole: Any, split: Any, in_16_bits: bool = False) -> float:
    """Return the difference of two outputs, tensors or lists of them, as a share of what is allowed: 1 is the limit.

    It is infinite for outputs of different shapes, or where one is not finite. `in_16_bits`: they were computed so,
    whatever their dtype is.
    """
    if isinstance(whole, Tensor):
        return _difference(whole, split, in_16_bits) if isinstance(split, Tensor) else float("inf")
    if isinstance(whole, (list, tuple)):
        if not isinstance(split, (list, tuple)) or len(whole) != len(split):
            return float("inf")
        return max((difference(one, other, in_16_bits) for one, other in zip(whole, split, strict=True)), default=0.0)
    return 0.0 if type(whole) is type(split) else float("inf")


def _difference(whole: Tensor, split: Tensor, in_16_bits: bool) -> float:
    if whole.shape != split.shape or whole.dtype != split.dtype:
        return float("inf")
    if whole.numel() == 0 or not whole.is_floating_point():
        return 0.0 if torch.equal(whole, split) else float("inf")
    expected, delta = whole.float(), (split.float() - whole.float())
    if not bool(torch.isfinite(delta).all()):
        return float("inf")
    if whole.itemsize > 2 and not in_16_bits:
        return _share(delta.abs().max(), expected.std(correction=0), LIMIT_32)
    result = _share(delta.norm(), expected.norm(), LIMIT_16)
    if whole.ndim > 2:  # (B, C, ...): one norm for each position
        norms = expected.norm(dim=1)
        result = max(
            result, _share((delta.norm(dim=1) / norms.clamp(min=norms.square().mean().sqrt())).max(), 1.0, LIMIT_LOCAL)
        )
    return result


def _share(error: Tensor, scale: Tensor | float, limit: float) -> float:
    """Return how much of the limit an error is. An output of zeros must be equal."""
    scale = float(scale)
    return float(error) / (scale * limit) if scale else float("inf") if float(error) else 0.0


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
