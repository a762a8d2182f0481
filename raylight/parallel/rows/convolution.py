"""Convolutions and pooling over rows of all ranks: each rank computes its rows of the output.

With kernel k, dilation d, stride s and padding p along the height, output row o is made of input rows o * s - p to
o * s - p + d * (k - 1). It belongs to the rank that has the input row in the middle of them, so outputs are cut where
inputs are, and a rank needs about half a kernel of its neighbours' rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .exchange import Halo, own, recut
from .layout import Cuts, Span
from .row_tensor import RowTensor, mixes, plain, position, rule, wrap
from .strips import Strips, strips_of

Local = Callable[[Tensor, int], Tensor]  # a rank's operation on rows, with the padding of rows to use
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of dimensions


@dataclass(frozen=True, slots=True)
class Window:
    """A window that slides over rows: `reach` is the number of rows from its first to its last."""

    reach: int
    stride: int
    padding: int

    def output(self, cuts: Cuts) -> Cuts:
        """Return how the output is cut."""
        total = (cuts.total + 2 * self.padding - self.reach - 1) // self.stride + 1
        middle = self.padding - self.reach // 2
        inner = [min(max(-(-(bound + middle) // self.stride), 0), total) for bound in cuts.bounds[1:-1]]
        return Cuts((0, *inner, total))

    def need(self, rows: Span) -> Span:
        """Return the input rows, those of padding included, for these output rows."""
        start, stop = rows
        first = start * self.stride - self.padding
        return (first, (stop - 1) * self.stride - self.padding + self.reach + 1) if stop > start else (first, first)


def slide(name: str, tensor: RowTensor, window: Window, local: Local) -> Tensor:
    """Return this rank's rows of what `local` computes with a window that slides over the rows of all ranks.

    Raises RowsError: a rank would have no rows of the output.
    """
    rows, ranks = tensor.rows, tensor.ranks
    if rows.outer > 1:
        raise mixes(name, tensor, "its rows are flattened together with other dimensions")
    if window.reach == 0 and window.stride == 1 and window.padding == 0:
        return wrap(local(plain(tensor), 0), rows, ranks)
    output, wanted, needs = _geometry(window, rows.cuts)
    if min(output.sizes) < 1:
        raise mixes(name, tensor, "the picture has too few rows for so many ranks")
    need, want = needs[ranks.rank], wanted[ranks.rank]
    ranks.convolved_rows += need[1] - need[0]
    ranks.convolved_of += rows.cuts.total
    if _is_by_edges(window, rows.cuts) and _bytes_a_rank(tensor) >= ranks.hides_halos_from:
        result = _by_edges(own(tensor), window, needs, local)
    else:
        result = local(Halo(tensor, needs, _order(tensor)).assembled(need[0] - want[0], want[1] - need[1]), 0)
    return wrap(result, recut(rows, output), ranks)


@lru_cache(maxsize=1024)  # a model has few kinds of windows, and slides them over and over
def _geometry(window: Window, cuts: Cuts) -> tuple[Cuts, tuple[Span, ...], tuple[Span, ...]]:
    """Return how the output is cut, and the input rows that each rank needs: with those of padding, and without."""
    output = window.output(cuts)
    wanted = tuple(window.need(span) for span in output.spans)
    return output, wanted, tuple((max(start, 0), min(stop, cuts.total)) for start, stop in wanted)


@lru_cache(maxsize=1024)
def _is_by_edges(window: Window, cuts: Cuts) -> bool:
    """Return whether each rank has an output row for each of its rows, and only those by its edges lack a neighbour."""
    for (start, stop), wanted in zip(cuts.spans, _geometry(window, cuts)[1], strict=True):
        above, below = start - wanted[0], wanted[1] - stop
        is_same = window.stride == 1 and above == below == window.padding
        # Near an edge of the image, a halo may be shorter than the padding.
        is_whole = start in (0, max(start, above)) and stop in (cuts.total, min(stop, cuts.total - below))
        if not (is_same and is_whole and stop - start >= window.reach):
            return False
    return True


def _bytes_a_rank(tensor: RowTensor) -> float:
    """Return the mean bytes that ranks have of a tensor: the same number on each, as all must go the same way."""
    shape = list(tensor.shape)
    shape[position(tensor.rows, tensor)] = tensor.rows.cuts.total
    return math.prod(shape) * tensor.dtype.itemsize / tensor.ranks.ranks


def _order(tensor: RowTensor) -> torch.memory_format | None:
    """Return the order of memory in which a tensor is convolved: channels last, or None for whichever it has.

    Not by the tensor's strides: ranks may have other ones, and have to exchange rows in the same order.
    """
    ranks = tensor.ranks
    if not ranks.channels_last:
        return None
    if not ranks.orders_any and (tensor.device.type != "cuda" or tensor.dtype.itemsize != 2):
        return None
    return _CHANNELS_LAST.get(tensor.ndim)


def _by_edges(tensor: RowTensor, window: Window, needs: Sequence[Span], local: Local) -> Tensor:
    """Compute on this rank's rows without a copy while halos are on their way, then the rows at the cuts again.

    The first and last `padding` rows of the result lack the neighbours' rows; those are computed from the halo and
    `reach` rows of this rank, both edges as one batch.
    """
    dim, order, ranks = position(tensor.rows, tensor), _order(tensor), tensor.ranks
    halo = Halo(tensor, needs, order)
    x = plain(tensor) if order is None else plain(tensor).contiguous(memory_format=order)
    result = local(x, window.padding)
    edges = _edges(window, x.shape[dim], ranks.rank > 0, ranks.rank < ranks.ranks - 1)
    if edges is None:
        return result
    count = len(edges.own.firsts)
    shape = list(x.shape)
    shape[0], shape[dim] = count * shape[0], window.reach + window.padding
    batch = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=order or torch.contiguous_format)
    strips_of(batch, dim, edges.kept, count).copy_(strips_of(x, dim, edges.own))
    ((_, received),) = halo.wait()  # as many rows from above and from below
    strips_of(batch, dim, edges.halos, count).copy_(received)
    again = local(batch, 0)
    strips_of(result, dim, edges.lacking).copy_(again.view(count, -1, *again.shape[1:]))
    return result


@dataclass(frozen=True, slots=True)
class _Edges:
    """Which rows the edges of a rank are made of, the upper one first: `own` rows of its tensor are `kept` beside
    `halos` in the batch of edges, whose result is what the whole's is `lacking`.
    """

    own: Strips
    kept: Strips
    halos: Strips
    lacking: Strips


@lru_cache(maxsize=1024)
def _edges(window: Window, rows: int, has_above: bool, has_below: bool) -> _Edges | None:
    """Return the edges of a rank of so many rows, or None if it has no neighbour."""
    reach, pad = window.reach, window.padding
    places = [(0, pad, 0, 0)] * has_above + [(rows - reach, 0, reach, rows - pad)] * has_below
    if not places:
        return None
    own, kept, halos, lacking = zip(*places, strict=True)
    return _Edges(Strips(own, reach), Strips(kept, reach), Strips(halos, pad), Strips(lacking, pad))


def _tuple(value: Any, length: int) -> tuple[int, ...]:
    if isinstance(value, (list, tuple)):
        return tuple(value) if len(value) == length else tuple(value) * length
    return (value,) * length


def _named(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _height(name: str, tensor: RowTensor, spatial: int) -> int | None:
    """Return which of the spatial dimensions are the rows, or None if they are in the batch."""
    if position(tensor.rows, tensor) == 0 and tensor.ndim == spatial + 2:
        return None
    if tensor.rows.dim < -spatial:
        raise mixes(name, tensor, "its rows are channels")
    return spatial + tensor.rows.dim


CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


@rule("conv1d", "conv2d", "conv3d")
def convolution(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Convolve."""
    return _convolve(func, _named(CONVOLUTION, args, kwargs), int(func.__name__[4]))


@rule("cudnn_convolution")
def cudnn_convolution(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Convolve by cuDNN, as ComfyUI does to get around a fault of PyTorch's."""
    given = _named(("input", "weight", "padding", "stride", "dilation", "groups"), args, kwargs)
    return _convolve(func, given, given["weight"].ndim - 2)


def _convolve(func: Callable[..., Any], given: dict[str, Any], spatial: int) -> Tensor:
    tensor, name = given.pop("input"), func.__name__
    index = _height(name, tensor, spatial)
    weight = given.pop("weight")
    if index is None:
        return wrap(func(plain(tensor), weight, **given), tensor.rows, tensor.ranks)
    stride, dilation = _tuple(given.get("stride", 1), spatial), _tuple(given.get("dilation", 1), spatial)
    padding = given.get("padding", 0)
    reaches = [step * (size - 1) for step, size in zip(dilation, weight.shape[2:], strict=True)]
    if padding == "same" and any(reach % 2 for reach in reaches):
        raise mixes(name, tensor, "an uneven padding 'same'")
    if isinstance(padding, str):
        padding = [reach // 2 if padding == "same" else 0 for reach in reaches]
    padding = list(_tuple(padding, spatial))

    def local(x: Tensor, rows: int) -> Tensor:
        padding[index] = rows
        return func(x, weight, **{**given, "padding": tuple(padding), "stride": stride, "dilation": dilation})

    return slide(name, tensor, Window(reaches[index], stride[index], padding[index]), local)


POOL = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")


@rule("avg_pool2d", "avg_pool3d")
def pool(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Average over windows without padding."""
    given = _named(POOL, args, kwargs)
    tensor, name = given.pop("input"), func.__name__
    spatial = int(name[-2])
    index = _height(name, tensor, spatial)
    size = _tuple(given["kernel_size"], spatial)
    stride = _tuple(given.get("stride") or size, spatial)
    if any(_tuple(given.get("padding", 0), spatial)) or given.get("ceil_mode"):
        raise mixes(name, tensor, "padding and ceil_mode have no rule")

    def local(x: Tensor, _: int) -> Tensor:
        return func(x, **given)

    if index is None:
        return wrap(local(plain(tensor), 0), tensor.rows, tensor.ranks)
    return slide(name, tensor, Window(size[index] - 1, stride[index], 0), local)


TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


@rule("conv_transpose2d", "conv_transpose3d")
def transposed(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Convolve transposed: input row i adds to output rows i * stride - padding and the `reach` that follow."""
    given = _named(TRANSPOSED, args, kwargs)
    tensor, weight = given.pop("input"), given.pop("weight")
    name, rows, ranks = func.__name__, tensor.rows, tensor.ranks
    spatial = int(name[-2])
    index = _height(name, tensor, spatial)
    if index is None or rows.outer > 1:
        raise mixes(name, tensor, "its rows are in the batch")
    stride, padding = _tuple(given.get("stride", 1), spatial), list(_tuple(given.get("padding", 0), spatial))
    dilation, extra = _tuple(given.get("dilation", 1), spatial), _tuple(given.get("output_padding", 0), spatial)
    reach, step, pad = dilation[index] * (weight.shape[2 + index] - 1), stride[index], padding[index]
    total = (rows.cuts.total - 1) * step - 2 * pad + reach + 1 + extra[index]
    output = Cuts((*(bound * step for bound in rows.cuts.bounds[:-1]), total))
    needs = [
        (max(-((reach - start - pad) // step), 0), min((stop - 1 + pad) // step + 1, rows.cuts.total))
        for start, stop in output.spans
    ]
    full = Halo(tensor, needs).assembled()
    padding[index] = 0
    made = func(full, weight, **{**given, "padding": tuple(padding), "stride": stride, "dilation": dilation})
    start, stop = output.spans[ranks.rank]
    first = needs[ranks.rank][0] * step - pad  # the output row that `made` begins with
    ranks.convolved_rows += full.shape[rows.dim]
    ranks.convolved_of += rows.cuts.total
    return wrap(made.narrow(rows.dim, start - first, stop - start), recut(rows, output), ranks)
