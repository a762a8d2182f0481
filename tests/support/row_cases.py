"""Operations on rows of several ranks against the same operation on the whole picture."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from raylight.parallel.rows.engine import Factories, finished, shared
from raylight.parallel.rows.layout import Cuts, cut
from raylight.parallel.rows.row_tensor import RowGroup, RowsError

Operation = Callable[[Tensor], Tensor]


def _attention(x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2).unsqueeze(1)  # (B, 1, H * W, C)
    out = functional.scaled_dot_product_attention(tokens, tokens, tokens)
    return out.squeeze(1).transpose(1, 2).reshape(x.shape)


def _products(x: Tensor) -> Tensor:
    tokens = x.flatten(2)
    weights = functional.softmax(torch.bmm(tokens.transpose(1, 2), tokens), dim=2)
    return torch.bmm(tokens, weights.transpose(1, 2)).reshape(x.shape)


def _frames(x: Tensor) -> Tensor:
    """Attend over time at each place, as Mochi does."""
    b, c, t, h, w = x.shape
    tokens = x.permute(0, 3, 4, 2, 1).reshape(b * h * w, 1, t, c)
    out = functional.scaled_dot_product_attention(tokens, tokens, tokens)
    return out.reshape(b, h, w, t, c).permute(0, 4, 3, 1, 2)


def _padded(mode: str, widths: tuple[int, ...]) -> Operation:
    def run(x: Tensor) -> Tensor:
        padded = functional.pad(x, widths, mode=mode)
        b, c, h, w = padded.shape
        # The shape is what a model sees of it, and may reshape by.
        return functional.conv2d(padded.reshape(b * c, 1, h, w).reshape(b, c, h, w), *_weights(4, 4, 3))

    return run


def _weights(inputs: int, outputs: int, size: int, dims: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (outputs, inputs, *[size] * dims)
    weight = torch.randn(shape, generator=generator)
    return weight * weight[0].numel() ** -0.5, torch.randn(outputs, generator=generator)


def _conv(size: int, dims: int = 2, **options: object) -> Operation:
    function = functional.conv2d if dims == 2 else functional.conv3d
    return lambda x: function(x, *_weights(4, 4, size, dims), **options)


def _transposed(size: int, **options: int) -> Operation:
    return lambda x: functional.conv_transpose2d(x, *_weights(4, 4, size), **options)


def _wide(x: Tensor) -> Tensor:
    """Attend in groups of channels over values far from 0, whose variance a difference of squares would lose."""
    return functional.group_norm(x + 1000, 2, torch.arange(1.0, 5), torch.arange(4.0))


def _plain_copy(x: Tensor) -> Tensor:
    result = torch.empty(x.shape)
    result[:] = x
    return result


def _written(x: Tensor) -> Tensor:
    result = torch.empty_like(x)
    result[:1] = x[:1] * 2
    result[1:, :, :, ::2] = 3.0
    result[1:, :, :, 1::2] = x[1:, :, :, 1::2]
    return result


IMAGES: dict[str, Operation] = {
    "kernel 3": _conv(3, padding=1),
    "kernel 9, halo higher than a rank's piece": _conv(9, padding=4),
    "kernel 3, dilation 4": _conv(3, padding=4, dilation=4),
    "kernel 5, less padding": _conv(5, padding=1),
    "kernel 3, more padding": _conv(3, padding=2),
    "kernel 4, even": _conv(4, padding=1),
    "kernel 3, one column": lambda x: _conv(3, padding=1)(x[..., :1]),
    "padding same": _conv(3, padding="same"),
    "stride 2": _conv(3, padding=1, stride=2),
    "stride 2, kernel 2": _conv(2, stride=2),
    "stride 3, kernel 3": _conv(3, stride=3),
    "stride 2 after padding below": lambda x: _conv(3, stride=2)(functional.pad(x, (0, 1, 0, 1))),
    "zeros": _padded("constant", (1, 1, 1, 1)),
    "replicate": _padded("replicate", (1, 1, 1, 1)),
    "reflect": _padded("reflect", (2, 2, 2, 2)),
    "more above": _padded("constant", (0, 1, 2, 0)),
    "reflecting module": lambda x: nn.ReflectionPad2d(1)(x)[..., :-2].contiguous() * 1.0,
    "transposed 4, stride 2": _transposed(4, stride=2, padding=1),
    "transposed 3, stride 2": _transposed(3, stride=2, padding=1, output_padding=1),
    "transposed 2, stride 2": _transposed(2, stride=2),
    "nearest": lambda x: functional.interpolate(x, scale_factor=2.0),
    "nearest by size": lambda x: functional.interpolate(x, size=(x.shape[2] * 3, 11), mode="nearest"),
    "bilinear": lambda x: functional.interpolate(x, scale_factor=2, mode="bilinear"),
    "average pool": lambda x: functional.avg_pool2d(x, 2, 2),
    "pixel shuffle": lambda x: functional.pixel_shuffle(x, 2),
    "group norm": lambda x: functional.group_norm(x, 2),
    "group norm far from 0": _wide,
    "mean of the picture": lambda x: x * functional.adaptive_avg_pool2d(x, 1),
    "mean over height": lambda x: x - x.mean(dim=2, keepdim=True),
    "attention": _attention,
    "products": _products,
    "repeated rows": lambda x: x.repeat_interleave(2, dim=2),
    "rows into channels and back": lambda x: x.unflatten(1, (2, 2)).permute(0, 1, 3, 2, 4).flatten(2, 3),
    "noise": lambda x: x + torch.randn_like(x),
    "constants": lambda x: torch.cat([x, torch.zeros(x.shape)], 1),
    "in place": lambda x: x.clone().add_(1).mul_(x),
    "written into": _written,
    "other cuts": lambda x: functional.pad(x, (0, 0, 0, 2))[:, :, :, 1:] + functional.pad(x, (0, 0, 2, 0))[:, :, :, 1:],
}
VIDEOS: dict[str, Operation] = {
    "kernel 3": _conv(3, 3, padding=1),
    "kernel 3, one frame": lambda x: _conv(3, 3, padding=1)(x[:, :, :1]),
    "replicate": lambda x: _conv(3, 3)(functional.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate")),
    "group norm": lambda x: functional.group_norm(x, 2),
    "frames": _frames,
    "tokens of all frames": _attention,
    "frames as batch": lambda x: _conv(3, padding=1)(x.permute(0, 2, 1, 3, 4).flatten(0, 1)),
}
# Each would be wrong if a rank computed it from its own rows.
REFUSED: dict[str, Operation] = {
    "softmax over rows": lambda x: functional.softmax(x, dim=2),
    "part of the rows": lambda x: x[:, :, 1:],
    "the highest row": lambda x: x.amax(dim=2),
    "an unknown operation": lambda x: torch.fft.rfft(x),
    "a position table": lambda x: x + torch.linspace(0, 1, x.shape[2])[:, None],
    "norm over rows": lambda x: functional.layer_norm(x, x.shape[1:]),
    "linear along rows": lambda x: functional.linear(x.transpose(2, 3), torch.ones(3, x.shape[2])),
    "joined along rows": lambda x: torch.cat([x, x], dim=2),
    "rows by index": lambda x: x[:, :, torch.arange(x.shape[2])],
    "flipped": lambda x: x.flip(2),
    "decided by a value": lambda x: x if (x > 0).all() else -x,
    "written into an ordinary tensor": _plain_copy,
    "circular": lambda x: functional.pad(x, (0, 0, 1, 1), mode="circular"),
    "half the rows": lambda x: functional.interpolate(x, scale_factor=0.5),
    "max pool": lambda x: functional.max_pool2d(x, 2),
    "masked attention": lambda x: functional.scaled_dot_product_attention(x, x, x, is_causal=True),
}


@dataclass(frozen=True)
class Errors:
    """The largest errors of an operation's rows: against the whole, and of channels last against the usual order."""

    whole: float
    order: float


def run_all(rank: int, world: int, heights: tuple[int, ...]) -> dict[tuple[str, int], Errors | str]:
    """Return the errors of each operation on pictures of these heights, or what it raised."""
    found: dict[tuple[str, int], Errors | str] = {}
    for height in heights:
        for kind, operations, shape in (("image", IMAGES, (2, 4, height, 10)), ("video", VIDEOS, (1, 4, 3, height, 6))):
            for name, operation in operations.items():
                try:
                    found[f"{kind}: {name}", height] = _errors(operation, shape, rank, world)
                except RowsError as error:
                    found[f"{kind}: {name}", height] = str(error)
    return found


def _errors(operation: Operation, shape: tuple[int, ...], rank: int, world: int) -> Errors:
    full = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    expected = operation(full.clone())
    whole, order = [], []
    for least in (0, math.inf):
        usual, last = (
            _run(operation, full, RowGroup(dist.group.WORLD, world, rank, last, last, hides_halos_from=least))
            for last in (False, True)
        )
        for local, cuts in (usual, last):
            if cuts.total != expected.shape[-2]:
                raise RowsError(f"{cuts.total} rows instead of {expected.shape[-2]}")
            start, stop = cuts.spans[rank]
            whole.append((local - expected[..., start:stop, :]).abs().max().item())
        order.append((last[0] - usual[0]).abs().max().item())
    return Errors(max(whole), max(order))


def _run(operation: Operation, full: Tensor, ranks: RowGroup) -> tuple[Tensor, Cuts]:
    """Return this rank's rows. With channels last, every other rank's own are in that order before."""
    torch.manual_seed(2)
    if ranks.channels_last and ranks.rank % 2:
        full = full.contiguous(memory_format=torch.channels_last if full.ndim == 4 else torch.channels_last_3d)
    with Factories():
        return finished(operation(shared(full, cut(full.shape[-2], ranks.ranks), ranks)))


def refuse_all(rank: int, world: int) -> dict[str, str]:
    """Return what each operation that mixes rows raised, or "" for a result."""
    found = {}
    for name, operation in REFUSED.items():
        full = torch.randn(2, 4, 12, 10, generator=torch.Generator().manual_seed(1))
        try:
            with Factories():
                operation(shared(full, cut(12, world), RowGroup(dist.group.WORLD, world, rank)))
            found[name] = ""
        except RowsError as error:
            found[name] = str(error)
    return found
