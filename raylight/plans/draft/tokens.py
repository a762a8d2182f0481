"""Which arguments of a block are token streams, from the lengths of the sequences in its attention."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .record import Call, Shape


@dataclass(frozen=True)
class Tokens:
    """A stream that a block gets at `place` and returns: `count` tokens, on `grid` dimensions from `dim` on."""

    name: str
    place: str
    dim: int
    grid: int
    count: int


def find_streams(call: Call, lengths: Sequence[int], prefix: str) -> list[Tokens]:
    """Return the streams of a block that attends over sequences of these lengths, the longest that can be explained.

    Return the empty list if no argument that the block also returns has so many tokens.
    """
    returned = _returned(call)
    for length in sorted(set(lengths), reverse=True):
        for size in (1, 2, 3):
            for places in itertools.combinations(returned, size):
                options = [list(_layouts(call.inputs[place], size == 1)) for place in places]
                for chosen in itertools.product(*options):
                    if sum(count for *_, count in chosen) == length:
                        return [
                            Tokens(f"{prefix}{place}", place, *layout)
                            for place, layout in zip(places, chosen, strict=True)
                        ]
    return []


def _returned(call: Call) -> list[str]:
    """Return the arguments with the shape of an output, at most one for each output."""
    outputs = list(call.outputs.values())
    places = []
    for place, shape in call.inputs.items():
        if shape in outputs and len(shape) > 1:
            outputs.remove(shape)
            places.append(place)
    return places


def _layouts(shape: Shape, alone: bool) -> Iterator[tuple[int, int, int]]:
    """Iterate over where tokens may be in a tensor, as (dim, grid, count), the likeliest first. The last dimension is
    the width.
    """
    for grid in (1, 2, 3):
        for dim in sorted(range(len(shape) - grid), key=lambda dim: (dim != 1, dim)):
            count = math.prod(shape[dim : dim + grid])
            if count > 1 or (not alone and dim == 1):
                yield dim, grid, count


def joined(streams: Sequence[Tokens], count: int, reverse: bool = False) -> tuple[str, ...] | None:
    """Return names of streams with `count` tokens together, in the order of the block's arguments or its `reverse`."""
    for size in range(1, len(streams) + 1):
        for chosen in itertools.combinations(streams, size):
            if sum(one.count for one in chosen) == count:
                names = tuple(one.name for one in chosen)
                return names[::-1] if reverse else names
    return None


def place_of(call: Call, shape: Shape, taken: set[str]) -> str | None:
    """Return where a block returns a tensor of this shape, other than at the places `taken`."""
    return next((place for place, found in call.outputs.items() if found == shape and place not in taken), None)
