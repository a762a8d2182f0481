"""Differences at few places of an output: rounding is alike everywhere, an error at the border of shards is not.

The tokens of an output lie along one axis or several, which may be any of them. So its values are grouped by every
choice of axes: each token, channel, row of the batch and line of the image by itself, and each value. For each choice,
a group may differ by a few times as much as ordinary groups do, or as it differs itself by rounding alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations

import torch
from torch import Tensor

Axes = tuple[int, ...]

# How many times as much as rounding a group may differ, besides what chance makes of it: other kernels round elsewhere,
# and the rounding of a group is measured once.
_MARGIN = 3.0
# How many times as much the rounding of a split forward may be as what was measured of the whole one: values that are
# quantized for each rank have other scales.
_COARSER = 4.0
# The norm of the difference of a group over its own norm or that of an ordinary one, besides what chance makes of it.
_LIMIT = 0.1
# How far two results of the same rounding are apart on average (RMS), as a share of epsilon.
_APART = 0.25
# Of 1e9 groups, one may differ by chance by more than what is allowed for chance.
_SURENESS = math.log(1e9)
# The z-score of the lower quartile: up to three quarters of the groups may be wrong.
_QUARTILE = -0.6745


def local_difference(expected: Tensor, delta: Tensor, epsilon: float, rounding: Tensor | None = None) -> float:
    """Return the largest difference of any group of values as a share of what is allowed: 1 is the limit.

    `delta` is what is to be judged, `rounding` a difference that is known to be by rounding only; float32, of the shape
    of `expected`. `epsilon` is that of the output's dtype. Without `rounding`, groups are compared with one another
    only: an output whose rounding is not alike everywhere may then be over the limit though it is right.
    """
    expected, delta = expected.squeeze().square(), delta.squeeze().square()
    if rounding is not None:
        rounding = rounding.squeeze().square()
    largest = 0.0
    for axes in _choices(expected.ndim):
        found, norms = _means(delta, axes), _means(expected, axes)
        size = expected.numel() // found.numel()
        ordinary_norm = _ordinary(norms, size)
        by_dtype = norms.clamp(min=ordinary_norm) * (_APART * epsilon) ** 2
        scale = torch.maximum(by_dtype, _of_all(found, size, rounding, axes))
        allowed = torch.minimum(scale * _MARGIN**2, norms.clamp(min=ordinary_norm) * _LIMIT**2) * _chance(size)
        largest = max(largest, float(torch.where(found > 0, found / allowed, 0.0).max()))
    return math.sqrt(largest)


def _of_all(found: Tensor, size: int, rounding: Tensor | None, axes: Axes) -> Tensor:
    """Return the mean square by which a group may be expected to differ: that of ordinary groups, or of the group."""
    level = _ordinary(found, size)
    if rounding is None:
        return level
    own = _means(rounding, axes)
    usual = _ordinary(own, size)
    level = level.clamp(min=usual, max=usual * _COARSER**2)
    # What was measured once of a few values may be small by chance, so all larger groups that it is in count as well.
    for axis in range(rounding.ndim):
        if axis not in axes and len(axes) + 1 < rounding.ndim:
            own = torch.maximum(own, _means(rounding, (*axes, axis)))
    return torch.maximum(own, level)


def _choices(ndim: int) -> Iterator[Axes]:
    """Yield the axes to reduce, for every way to group: all sets of axes but the set of all."""
    for count in range(max(ndim, 1)):
        yield from combinations(range(ndim), count)


def _means(squares: Tensor, axes: Axes) -> Tensor:
    return squares.mean(dim=axes, keepdim=True) if axes else squares


def _ordinary(means: Tensor, size: int) -> Tensor:
    """Return the mean square of ordinary groups of `size` values: by the lower quartile, as many may be wrong."""
    lower = means.flatten().sort().values[(means.numel() - 1) // 4]  # `kthvalue` is not deterministic on CUDA
    return lower / (1 - 2 / (9 * size) + _QUARTILE * math.sqrt(2 / (9 * size))) ** 3  # of chi-squared, Wilson-Hilferty


def _chance(size: int) -> float:
    """Return how many times its expectation the mean of `size` squares of a normal distribution may be (Laurent and
    Massart).
    """
    return 1 + 2 * math.sqrt(_SURENESS / size) + 2 * _SURENESS / size
