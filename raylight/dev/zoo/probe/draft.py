"""The lines of a plan, from the records of three forwards."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from raylight.plans.draft.record import AttentionCall, Record, Shape, within

from .subject import SIZES

Counts = tuple[int, ...]  # one for each of SIZES


@dataclass
class Block:
    """The findings about one list of blocks.

    `streams` are the token streams that it receives, each with its token dimension and its position in the output;
    `lines` are entries of a plan's `inputs`; `notes` need a look by the author.
    """

    pattern: str
    path: str
    streams: dict[str, tuple[int, str]] = field(default_factory=dict)
    lines: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def varying(shapes: list[Shape]) -> list[tuple[int, Counts]]:
    """Return the dimensions whose size is not the same at all SIZES."""
    if len({len(shape) for shape in shapes}) > 1:
        return []
    sizes = enumerate(zip(*shapes, strict=True))
    return [(dim, counts) for dim, counts in sizes if len(set(counts)) > 1]


def kind(counts: Counts) -> str:
    """Return whose tokens these numbers count, from the SIZES at which they grow."""
    base, image, text = counts
    return "tokens" if image != base and text != base else "img" if image != base else "txt"


def describe(pattern: str, path: str, records: Mapping[str, Record], known: dict[str, Counts]) -> Block | None:
    """Describe the inputs of the first block of a list; None if none depends on the sizes, or it is not called.

    `known` are the streams of earlier lists; those that enter here are added.
    """
    calls = [records[size].calls.get(path) for size in SIZES]
    if any(call is None for call in calls):
        return None
    block = Block(pattern, path)
    others = {}
    for key in calls[0].inputs:
        shapes = [call.inputs.get(key, ()) for call in calls]
        found = varying(shapes)
        place = next(
            (place for place in calls[0].outputs if [call.outputs.get(place) for call in calls] == shapes), None
        )
        if found and place is not None:
            _stream(block, key, shapes, place, known, queries(block, records))
        elif found:
            others[key] = found
    counts = {name: known[name] for name in block.streams}
    for key, found in others.items():
        _aligned(block, key, found, counts)
    for key, value in calls[0].numbers.items():
        if any(call.numbers.get(key) != value for call in calls[1:]):
            rule = "TokenRanges" if isinstance(value, list) else "TokenIndex"
            block.notes.append(f"{key} counts tokens ({value!r}): perhaps {rule}")
    return block if block.streams or block.notes else None


def queries(block: Block, records: Mapping[str, Record]) -> set[Counts]:
    """Return the query counts of the attention calls within a block, at each of SIZES."""
    counted = [[call.queries for call in of_size] for of_size in _calls_in(block, records)]
    return set(zip(*counted, strict=False))


def _calls_in(block: Block, records: Mapping[str, Record]) -> list[list[AttentionCall]]:
    """Return the attention calls within a block, at each of SIZES."""
    return [[call for call in records[size].attention if within(call.path, block.path)] for size in SIZES]


def _grid(shapes: list[Shape], dim: int, counts: set[Counts]) -> int:
    """Return the number of dimensions, up to `dim`, that hold tokens, from the sequence lengths in attention."""
    for grid in range(1, dim + 2):
        if tuple(math.prod(shape[dim - grid + 1 : dim + 1]) for shape in shapes) in counts:
            return grid
    return 1


def _stream(
    block: Block, key: str, shapes: list[Shape], place: str, known: dict[str, Counts], counts: set[Counts]
) -> None:
    dim, number = varying(shapes)[-1]
    grid = _grid(shapes, dim, counts)
    dim -= grid - 1
    number = tuple(math.prod(shape[dim : dim + grid]) for shape in shapes)
    where = ("" if dim == 1 else f", dim={dim}") + ("" if grid == 1 else f", grid={grid}")
    joined = [name for name in ("txt", "img") if name in known]
    if len(joined) == 2 and number == tuple(map(sum, zip(*(known[name] for name in joined), strict=True))):
        block.streams.update(dict.fromkeys(joined, (dim, place)))
        block.notes.append(f"{key} is local already: {' and '.join(joined)}, one after the other")
        return
    stream = kind(number)
    known.setdefault(stream, number)
    block.streams[stream] = dim, place
    block.lines[key] = f'Stream("{stream}"{where})'


def _aligned(block: Block, key: str, found: list[tuple[int, Counts]], counts: Mapping[str, Counts]) -> None:
    for dim, number in found:
        for size in range(1, len(counts) + 1):
            for streams in itertools.permutations(counts, size):
                if number == tuple(map(sum, zip(*(counts[name] for name in streams), strict=True))):
                    names = ", ".join(f'"{name}"' for name in streams) + ("," if size == 1 else "")
                    where = "" if dim == 1 else f", dim={dim}"
                    block.lines[key.partition("[")[0]] = f"Aligned(({names}){where})"
                    return
    block.notes.append(
        f"{key} has {found[0][1]} along dimension {found[0][0]}, not one for each token of a stream: it "
        f"stays full, unless the block compares it to its tokens"
    )


def attention(block: Block, records: Mapping[str, Record]) -> dict[str, str]:
    """Describe where the block attends, by the paths of a plan."""
    calls = _calls_in(block, records)
    lines = {}
    for module in dict.fromkeys(call.path for call in calls[0]):
        rows = [next(call for call in of_size if call.path == module) for of_size in calls]
        queries, keys = tuple(row.queries for row in rows), tuple(row.keys for row in rows)
        same = queries == keys
        path = block.pattern + module[len(block.path) :]
        lines[path] = f"{'SelfAttention' if same else 'CrossAttention'} of {dict(zip(SIZES, queries, strict=True))}"
    return lines
