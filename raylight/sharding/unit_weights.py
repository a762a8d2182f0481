"""The sharded weights of one unit: where their shards are, and where they lie in a buffer when they are gathered."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raylight.parallel.partition import offsets

from .alignment import aligned
from .gather_buffers import Buffer
from .rows import RowSplit

ALIGNMENT = 256  # bytes: what kernels and collectives read in the widest words begins at a multiple


@dataclass(frozen=True, slots=True)
class ShardedWeight:
    """The parameter `leaf` of a module, of full `shape` and a dtype; `padded` are this rank's rows (rows, ...), padded
    to as many as the first rank has if rows are split evenly.
    """

    module: nn.Module
    leaf: str
    shape: torch.Size
    padded: Tensor


@dataclass(frozen=True, slots=True)
class Part:
    """The bytes (n,) of a weight's rows that `rank` holds, in their place among all rows."""

    rank: int
    bytes: Tensor


class UnitWeights:
    """The weights that are gathered together; `offloaded` if their shards are in system memory.

    With offloaded shards, which are split evenly, `flat` (bytes,) has all of them, each at a multiple of `ALIGNMENT`:
    one copy brings them.
    """

    def __init__(self, weights: list[ShardedWeight], split: RowSplit, flat: Tensor | None) -> None:
        self._weights, self._split, self._flat = weights, split, flat
        self._degree = degree = split.ranks
        self._shards = [_bytes(weight.padded) for weight in weights]
        self._full = [
            degree * shard.numel() if split.is_even else weight.shape.numel() * weight.padded.element_size()
            for weight, shard in zip(weights, self._shards, strict=True)
        ]
        self._starts, end = [], 0
        for nbytes in self._full:
            self._starts.append(end)
            end += aligned(nbytes, ALIGNMENT)
        self._resting: list[nn.Parameter | None] = []
        self._views: dict[Buffer | None, list[nn.Parameter]] = {}
        self._regions: dict[Buffer, tuple[list[Tensor], list[Tensor]]] = {}
        self._parts: dict[Buffer, tuple[list[Tensor], list[Part]]] = {}
        self.is_even = split.is_even
        self.is_offloaded = flat is not None
        self.needs_gather = bool(weights) and (degree > 1 or flat is not None)
        self.full_bytes = end if self.needs_gather else 0
        self.staged_bytes = flat.numel() if flat is not None and degree > 1 else 0

    def transfers(self, buffer: Buffer, staging: Buffer) -> tuple[list[Tensor], list[Tensor]]:
        """Return what each rank sends and receives to have the weights in a buffer: bytes of shards, (n,), and of full
        weights, (degree * n,). Offloaded shards are copied to the device by this, by way of `staging`.
        """
        if self._flat is not None:
            to = buffer if self._degree == 1 else staging
            to.bytes[: self._flat.numel()].copy_(self._flat, non_blocking=True)
        if buffer not in self._regions:
            sizes = [shard.numel() for shard in self._shards]
            full = self._full_in(buffer)
            shards = self._shards if self._flat is None else cut(staging.bytes, sizes) if self._degree > 1 else []
            self._regions[buffer] = shards, full
        return self._regions[buffer]

    def parts(self, buffer: Buffer) -> list[Part]:
        """Return what to receive from each rank to have the weights in a buffer, of those that are split unevenly, in
        the same order on every rank. This rank's own rows are there when the work that this starts is done.
        """
        if buffer not in self._parts:
            own, parts = [], []
            for weight, full in zip(self._weights, self._full_in(buffer), strict=True):
                sizes = self._split.sizes(weight.shape[0])
                rows = full.view(weight.shape[0], -1)
                of_ranks = [rows[start : start + size] for start, size in zip(offsets(sizes), sizes, strict=True)]
                own.append(of_ranks[self._split.rank].view(-1))
                parts += [Part(rank, piece.view(-1)) for rank, piece in enumerate(of_ranks) if piece.numel()]
            self._parts[buffer] = own, parts
        own, parts = self._parts[buffer]
        for place, shard in zip(own, self._shards, strict=True):
            place.copy_(shard, non_blocking=True)
        return parts

    def _full_in(self, buffer: Buffer) -> list[Tensor]:
        """Return the bytes of each full weight in a buffer, (n,)."""
        return [buffer.bytes[start : start + nbytes] for start, nbytes in zip(self._starts, self._full, strict=True)]

    def show(self, buffer: Buffer) -> None:
        """Let the parameters be the full weights in a buffer."""
        key = buffer if self.needs_gather else None
        if key not in self._views:
            self._views[key] = [self._view(buffer, index) for index in range(len(self._weights))]
        # Into the dict itself: `nn.Module` checks what is set, for a time that adds up.
        parameters = [weight.module._parameters for weight in self._weights]
        self._resting = [of_module[weight.leaf] for of_module, weight in zip(parameters, self._weights, strict=True)]
        for of_module, weight, view in zip(parameters, self._weights, self._views[key], strict=True):
            of_module[weight.leaf] = view

    def hide(self) -> None:
        """Let the parameters be the shards again, if they are not."""
        if self._resting:
            for weight, resting in zip(self._weights, self._resting, strict=True):
                weight.module._parameters[weight.leaf] = resting
            self._resting = []

    def _view(self, buffer: Buffer, index: int) -> nn.Parameter:
        weight = self._weights[index]
        with torch.inference_mode(False), torch.no_grad():
            value = weight.padded
            if self.needs_gather:
                start = self._starts[index]
                region = buffer.bytes[start : start + self._full[index]].view(value.dtype)
                value = region.view(-1, *weight.shape[1:])
            return nn.Parameter(value[: weight.shape[0]], requires_grad=False)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def cut(flat: Tensor, sizes: list[int]) -> list[Tensor]:
    """Return pieces of these sizes, each at the next multiple of `ALIGNMENT`."""
    pieces, start = [], 0
    for size in sizes:
        pieces.append(flat[start : start + size])
        start += aligned(size, ALIGNMENT)
    return pieces
