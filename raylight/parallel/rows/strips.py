"""Strips: as many rows from each of a few places of a tensor, as one view, so that one copy moves them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .layout import Span


@dataclass(frozen=True, slots=True)
class Strips:
    """`rows` rows from each of `firsts` on: one place or two, as more need not be evenly spaced."""

    firsts: tuple[int, ...]
    rows: int


def as_strips(spans: Sequence[Span], first: int) -> tuple[Strips, ...]:
    """Return spans of rows, in their order, as few strips, whose rows are counted from `first`."""
    if len({stop - start for start, stop in spans}) == 1 and len(spans) == 2:
        return (Strips(tuple(start - first for start, _ in spans), spans[0][1] - spans[0][0]),)
    return tuple(Strips((start - first,), stop - start) for start, stop in spans)


def strips_of(tensor: Tensor, dim: int, strips: Strips, batches: int = 1) -> Tensor:
    """Return strips of a tensor as a view: (B, ..., all rows, ...) -> (strips, B, ..., rows, ...).

    With `batches`, as many as there are strips, each is of its own: (batches * B, ..., all rows, ...).
    """
    shape, stride, firsts = list(tensor.shape), tensor.stride(), strips.firsts
    shape[0] //= batches
    apart = (firsts[-1] - firsts[0]) * stride[dim] + (shape[0] * stride[0] if batches > 1 else 0)
    shape[dim] = strips.rows
    first = tensor.storage_offset() + firsts[0] * stride[dim]
    return tensor.as_strided((len(firsts), *shape), (apart, *stride), first)


def packed(memory: Tensor, at: int, shape: tuple[int, ...], order: torch.memory_format | None) -> Tensor:
    """Return tensors that lie one after the other in `memory`, from element `at` on, as a view of `shape`, (tensors,
    ...), where each has that order of memory, or is contiguous.
    """
    return memory.as_strided(shape, _strides(shape, order), at)


@lru_cache(maxsize=1024)
def _strides(shape: tuple[int, ...], order: torch.memory_format | None) -> tuple[int, ...]:
    # By the shape alone: ranks whose own tensors have other strides read what they are sent alike.
    one = torch.empty(shape[1:], device="meta", memory_format=order or torch.contiguous_format)
    return (one.numel(), *one.stride())
