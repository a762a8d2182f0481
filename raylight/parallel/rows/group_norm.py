"""Normalization by the statistics of all ranks' rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from ..heartbeat import beat
from .exchange import own
from .row_tensor import RowTensor, mixes, plain, position, rule, wrap

# Of variances of activations of any size it changes nothing in float32. With 0 PyTorch's kernel has an inverse of 0 for
# a variance of 0, which would become infinite.
_EPSILON = 1e-30


@rule("batch_norm")
def batch_norm(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Normalize by running statistics, which are the same in all rows."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    tensor: RowTensor = given["input"]
    if given.get("training") or position(tensor.rows, tensor) == 1:
        raise mixes("batch_norm", tensor, "by statistics of its rows")
    return wrap(func(*args, **kwargs), tensor.rows, tensor.ranks)


@rule("group_norm")
def group_norm(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Normalize (B, C, ...) by the mean and variance of each group of channels over the rows of all ranks."""
    names = ("input", "num_groups", "weight", "bias", "eps")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    tensor: RowTensor = given["input"]
    rows, ranks = tensor.rows, tensor.ranks
    place = position(rows, tensor)
    if place == 0:
        return wrap(func(*args, **kwargs), rows, ranks)
    if place == 1:
        raise mixes("group_norm", tensor, "its rows are channels")
    tensor = own(tensor)
    x, groups = plain(tensor), given["num_groups"]
    means, variances = _local_statistics(x)  # (B, C)
    local = torch.stack([part.unflatten(1, (groups, -1)) for part in (means, variances)])  # (2, B, G, C / G)
    mean, variance = _merged(local[0], local[1], torch.ones_like(local[0]))  # of the groups of this rank
    mean, variance = _over_ranks(mean, variance, rows.cuts.sizes, ranks)  # (B, G)
    return wrap(_normalized(x, mean, variance, given), tensor.rows, ranks)


def _local_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each channel of (B, C, ...) on this rank, both (B, C) in float32."""
    if x.is_cuda and x.dtype != torch.float32:
        # In float32, without a copy of the image in it.
        parts = [torch.batch_norm_stats(image.unsqueeze(0), _EPSILON) for image in x]
        means, inverse = torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])
        variances = inverse.square().reciprocal()
        return means, variances
    variances, means = torch.var_mean(x.float(), dim=list(range(2, x.ndim)), correction=0)
    return means, variances


def _merged(means: Tensor, variances: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of parts with these along the last dimension, weighted by their counts.

    As T. F. Chan, G. H. Golub and R. J. LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979: nothing large is subtracted from something large.
    """
    weights = counts / counts.sum(-1, keepdim=True)
    mean = (means * weights).sum(-1, keepdim=True)
    variance = ((variances + (means - mean).square()) * weights).sum(-1)
    return mean.squeeze(-1), variance


def _over_ranks(mean: Tensor, variance: Tensor, sizes: tuple[int, ...], ranks: Any) -> tuple[Tensor, Tensor]:
    """Merge statistics, each (B, G), of ranks with `sizes` rows. Collective."""
    beat()
    mine = torch.stack([mean, variance])  # (2, B, G)
    all_of_them = [torch.empty_like(mine) for _ in range(ranks.ranks)]
    dist.all_gather(all_of_them, mine, group=ranks.group)
    ranks.exchanges += 1
    ranks.received_bytes += (ranks.ranks - 1) * mine.numel() * mine.element_size()
    means, variances = torch.stack(all_of_them, -1)  # (2, B, G, ranks)
    counts = torch.tensor(sizes, dtype=means.dtype).to(means.device, non_blocking=True).expand_as(means)
    return _merged(means, variances, counts)


def _normalized(x: Tensor, mean: Tensor, variance: Tensor, given: dict[str, Any]) -> Tensor:
    """Return `x`, (B, C, ...), normalized by statistics of groups, (B, G) in float32, in its own dtype."""
    channels = x.shape[1] // given["num_groups"]
    mean, variance = mean.repeat_interleave(channels, 1), variance.repeat_interleave(channels, 1)  # (B, C)
    weight, bias, eps = given.get("weight"), given.get("bias"), given.get("eps", 1e-5)
    weight = None if weight is None else weight.float()
    bias = None if bias is None else bias.float()
    images = [
        functional.batch_norm(image.unsqueeze(0), mean[i], variance[i], weight, bias, False, 0.0, eps)
        for i, image in enumerate(x)
    ]
    return images[0] if len(images) == 1 else torch.cat(images)
