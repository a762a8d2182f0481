"""Padding and resampling: what adds rows, at the edges of the image or between its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .exchange import Halo, fetch, own, recut
from .layout import Cuts, Rows
from .row_tensor import RowTensor, local_rows, mixes, plain, position, rule, wrap


@rule("pad")
def pad(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Pad. Rows are padded at the edges of the image; at a cut, a rank gets as many of its neighbour's in their place.

    A convolution that follows has all rows it needs then.
    """
    given = {**dict(zip(("input", "pad", "mode", "value"), args, strict=False)), **kwargs}
    tensor: RowTensor = given.pop("input")
    widths = list(given.pop("pad"))
    rows, ranks = tensor.rows, tensor.ranks
    place = 2 * (-rows.dim - 1)
    top, bottom = [*widths, *[0] * 12][place : place + 2]
    if top == bottom == 0:
        return wrap(func(plain(tensor), widths, **given), rows, ranks)
    mode = given.get("mode", "constant")
    if rows.outer > 1 or top < 0 or bottom < 0 or mode == "circular":
        raise mixes("pad", tensor, f"by {widths}, mode {mode}")
    tensor = own(tensor)
    total, last = rows.cuts.total, ranks.ranks - 1
    needs = [(max(start - top, 0), min(stop + bottom, total)) for start, stop in rows.cuts.spans]
    full = Halo(tensor, needs).assembled()
    widths[place], widths[place + 1] = top if ranks.rank == 0 else 0, bottom if ranks.rank == last else 0
    if mode == "reflect" and full.shape[rows.dim] <= max(widths[place : place + 2]):
        raise mixes("pad", tensor, "the picture has too few rows for so many ranks")
    padded = func(full, widths, **given) if any(widths) else full
    bounds = (0, *(bound + top for bound in rows.cuts.bounds[1:-1]), total + top + bottom)
    held = [(start + top, stop + top) for start, stop in needs]
    held[0] = (0, held[0][1])
    held[last] = (held[last][0], total + top + bottom)
    return wrap(padded, replace(rows, cuts=Cuts(bounds), held=tuple(held)), ranks)


@rule("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Make channels into rows and columns, or these into channels."""
    tensor = own(args[0])
    factor = args[1] if len(args) > 1 else next(iter(kwargs.values()))
    rows = tensor.rows
    if rows.dim != -2 or rows.outer > 1:
        raise mixes(func.__name__, tensor, "its rows are not the height")
    cuts = rows.cuts.scaled(factor) if func.__name__ == "pixel_shuffle" else rows.cuts.divided(factor)
    return wrap(func(plain(tensor), factor), recut(rows, cuts), tensor.ranks)


RESIZE = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")


@rule("interpolate", "upsample")
def interpolate(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Make each row into a whole number of rows: copies of it, or a linear mixture with its neighbours."""
    given = {**dict(zip(RESIZE, args, strict=False)), **kwargs}
    tensor = own(given.pop("input"))
    rows, ranks = tensor.rows, tensor.ranks
    mode, spatial = given.get("mode", "nearest"), tensor.ndim - 2
    if position(rows, tensor) == 0:
        return wrap(func(plain(tensor), **given), rows, ranks)
    if rows.dim < -spatial or rows.outer > 1:
        raise mixes("interpolate", tensor, "its rows are not the height")
    scale = _scale(given, rows, local_rows(tensor), spatial)
    if scale < 1 or scale != int(scale):
        raise mixes("interpolate", tensor, f"by {scale} along the rows")
    scale = int(scale)
    if mode.startswith("nearest") or scale == 1:
        return wrap(func(plain(tensor), **given), recut(rows, rows.cuts.scaled(scale)), ranks)
    if mode not in ("bilinear", "trilinear") or given.get("align_corners") or given.get("antialias"):
        raise mixes("interpolate", tensor, f"mode {mode}")
    spans, total = rows.cuts.spans, rows.cuts.total
    needs = [(max(start - 1, 0), min(stop + 1, total)) for start, stop in spans]
    full = fetch(tensor, needs)
    if given.get("size") is not None:
        size = list(given["size"])
        size[rows.dim] = full.shape[rows.dim] * scale
        given["size"] = tuple(size)
    made = func(full, **given)
    start, stop = spans[ranks.rank]
    first = (start - needs[ranks.rank][0]) * scale
    return wrap(made.narrow(rows.dim, first, (stop - start) * scale), recut(rows, rows.cuts.scaled(scale)), ranks)


def _scale(given: dict[str, Any], rows: Rows, count: int, spatial: int) -> Any:
    """Return the number of output rows for each row of this rank's `count`."""
    index = spatial + rows.dim
    size, scale = given.get("size"), given.get("scale_factor")
    if size is not None:
        return (size[index] if isinstance(size, (list, tuple, torch.Size)) else size) / count
    return scale[index] if isinstance(scale, (list, tuple)) else scale
