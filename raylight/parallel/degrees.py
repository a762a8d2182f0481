"""Degrees by the run: which mesh a forward is computed on, by its batch rows, the model and the links.

Every way to divide the ranks is estimated, relative to one row on one rank, and the cheapest is taken:

- Groups of the batch axis divide rows. They exchange nothing within a forward, but the one with most rows is waited
  for.
- Ranks of a sequence divide tokens, evenly or by their speeds. Their exchange was measured on H100 with NVLink
  (docs/performance.md): it costs 8 to 12 % on 2 and 4 ranks, more in a ring when sequences are short.
- Ulysses divides heads: with few of them some ranks have more than others. A ring does not, and its exchange runs
  beside attention, so it is what crosses a slow link.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh

from .mesh import Meshes, MeshShape
from .partition import divide
from .shares import ALIKE, Speeds, Weights

_EXCHANGE = 0.04  # of a forward, for each doubling of the ranks that split its tokens, and once more
_RING = 0.18  # of a forward, for each doubling of a ring: with a short sequence it hides little of its exchange
_SLOW_EXCHANGE = 0.50  # of a forward: Ulysses over links that are several times slower than others
_ATTENTION = 0.5  # attention's part of a forward, which the rank with most heads makes the others wait for


@dataclass(frozen=True, slots=True)
class Limits:
    """What a model allows: its attention heads, None if its tokens cannot be split, and whether a ring may be used,
    which needs the log-sum-exp of the kernel.
    """

    heads: int | None
    may_ring: bool = True


@dataclass(frozen=True, slots=True)
class Arrangement:
    """How ranks are arranged: on `mesh`, or with `by_run` for each forward as `DegreesByRun` chooses. Then `mesh` has
    the whole sequence, and a ring of more than 1 is kept. Ranks next to each other in groups of `fast_ranks` have links
    that are several times faster than those to others; 0 if none are, and 1 if all are slow. All work is shared by
    `speeds`, and sharded weights are held by `memory` as in `memory_shares`.
    """

    mesh: MeshShape
    by_run: bool = False
    fast_ranks: int = 0
    speeds: Speeds = ALIKE
    memory: Weights = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """The mesh for a forward of `rows` batch rows. Its batch axis divides the rows if `splits_rows`, and its other axes
    the tokens if `splits_tokens`; ranks along an axis that divides nothing do the same work. `why` says it in words.
    """

    shape: MeshShape
    rows: int
    splits_rows: bool
    splits_tokens: bool
    why: str

    def __str__(self) -> str:
        axes = {"batch": self.shape.batch} if self.splits_rows else {}
        axes |= {"ring": self.shape.ring, "ulysses": self.shape.ulysses} if self.splits_tokens else {}
        parts = [f"{name} {degree}" for name, degree in axes.items() if degree > 1]
        return f"{' x '.join(parts) or 'every worker does all'} ({self.why})"


@functools.lru_cache(256)  # it is asked for each forward
def choose(rows: int, arrangement: Arrangement, limits: Limits, what: str = "row") -> Choice:
    """Return the mesh for a forward of `rows` batch rows of one length, or for as many runs, the same on every rank.
    `what` they are is for the words only.
    """
    world_size, ring = arrangement.mesh.world_size, arrangement.mesh.ring
    shapes = [
        MeshShape(batch, r, world_size // batch // r)
        for batch in _divisors(world_size)
        for r in _divisors(world_size // batch)
        if ring in (1, r)
    ]
    possible = [shape for shape in shapes if _can(shape, limits)] or [MeshShape(world_size)]
    shape = min(possible, key=lambda one: (round(_cost(one, rows, arrangement, limits), 9), one.ring, -one.batch))
    splits_rows = rows >= shape.batch > 1
    splits_tokens = limits.heads is not None and shape.ring * shape.ulysses > 1
    return Choice(shape, rows, splits_rows, splits_tokens, _why(shape, rows, arrangement, limits, what))


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _can(shape: MeshShape, limits: Limits) -> bool:
    return limits.heads is None or (shape.ulysses <= limits.heads and (limits.may_ring or shape.ring == 1))


def _cost(shape: MeshShape, rows: int, arrangement: Arrangement, limits: Limits) -> float:
    """Estimate the time of a forward on `shape`, relative to one row on the fastest rank."""
    ranks = shape.ring * shape.ulysses
    speeds = arrangement.speeds.overall or (1,) * shape.world_size
    groups = [speeds[first : first + ranks] for first in range(0, len(speeds), ranks)]
    totals, fastest = [sum(group) for group in groups], max(speeds)
    each = divide(rows, shape.batch, totals) if rows >= shape.batch else (rows,) * shape.batch
    if limits.heads is None or ranks == 1:
        return max(count * fastest / min(group) for count, group in zip(each, groups, strict=True))
    extra = _exchange(shape, arrangement) + _ATTENTION * (_imbalance(limits.heads, shape, arrangement.speeds) - 1)
    return max(count * fastest / total for count, total in zip(each, totals, strict=True)) * (1 + extra)


def _exchange(shape: MeshShape, arrangement: Arrangement) -> float:
    """Estimate what the ranks of a sequence exchange takes, as a part of a forward."""
    extra = _EXCHANGE * (1 + math.log2(shape.ring * shape.ulysses)) + _RING * math.log2(shape.ring)
    return extra + _SLOW_EXCHANGE * _is_slow(shape.ulysses, arrangement)


def _imbalance(heads: int, shape: MeshShape, speeds: Speeds) -> float:
    """Return how long the rank with most heads for its speed takes for them, relative to all of a group together."""
    of_all, ranks = speeds.attention or (1,) * shape.world_size, shape.ring * shape.ulysses
    worst = 0.0
    for first in range(0, len(of_all), ranks):
        weights = [sum(of_all[first + place : first + ranks : shape.ulysses]) for place in range(shape.ulysses)]
        counts = divide(heads, shape.ulysses, weights)
        worst = max(worst, *(count * sum(weights) / weight for count, weight in zip(counts, weights, strict=True)))
    return worst / heads


def speed_up(shape: MeshShape, rows: int, arrangement: Arrangement, limits: Limits) -> float:
    """Estimate how many times as fast as on the fastest rank alone a forward of `rows` batch rows is on `shape`."""
    return rows / _cost(shape, rows, arrangement, limits)


def gain(arrangement: Arrangement, by_speed: bool = True) -> float:
    """Estimate how many times as fast as the fastest rank all ranks of one sequence are, with shares `by_speed` or
    equal ones.
    """
    shape = arrangement.mesh
    speeds = arrangement.speeds.overall or (1,) * shape.world_size
    ranks = shape.ring * shape.ulysses
    total = sum(speeds) if by_speed else len(speeds) * min(speeds)
    return total / max(speeds) / (1 + (_exchange(shape, arrangement) if ranks > 1 else 0.0))


def _is_slow(ulysses: int, arrangement: Arrangement) -> bool:
    """Return whether some Ulysses group has slow links; its ranks are next to each other."""
    return arrangement.fast_ranks > 0 and arrangement.fast_ranks % ulysses > 0


def _why(shape: MeshShape, rows: int, arrangement: Arrangement, limits: Limits, what: str) -> str:
    ranks, world_size = shape.ring * shape.ulysses, arrangement.mesh.world_size
    said = [f"one {what} at a time" if rows == 1 else f"{rows} {what}s"]
    if rows >= shape.batch > 1:
        said[0] += f" over {shape.batch} groups"
    elif rows > 1 and ranks > 1 and limits.heads is not None:
        said[0] += f", which {world_size} workers cannot divide as well as tokens"
    if limits.heads is None:
        said.append("this model's tokens cannot be split here")
    elif shape.ring > 1:
        said.append(_why_ring(shape, arrangement, limits.heads))
    elif ranks < world_size and rows < shape.batch:
        said.append(f"{_heads(limits.heads)}, and no ring with this attention")
    if arrangement.speeds != ALIKE and ranks > 1 and limits.heads is not None:
        said.append("each worker by its speed")
    if rows < shape.batch or (limits.heads is None and ranks > 1):
        said.append("some workers do the same work")
    return ", ".join(said)


def _why_ring(shape: MeshShape, arrangement: Arrangement, heads: int) -> str:
    ranks = shape.ring * shape.ulysses
    if arrangement.mesh.ring > 1:
        return f"ring_degree = {shape.ring} is given"
    if arrangement.fast_ranks == 1:
        return "each worker has slow links to all others"
    if _is_slow(ranks, arrangement):
        return f"fast links join {arrangement.fast_ranks} workers at a time"
    return f"{_heads(heads)} for {ranks} workers"


def _heads(count: int) -> str:
    return f"{count} attention head{'' if count == 1 else 's'}"


class DegreesByRun:
    """Chooses meshes for the forwards of one arrangement, and has them."""

    def __init__(self, arrangement: Arrangement, meshes: Meshes) -> None:
        self.arrangement, self._meshes = arrangement, meshes

    def choose(self, rows: int, limits: Limits, what: str = "row") -> Choice:
        """As the function `choose`."""
        return choose(rows, self.arrangement, limits, what)

    def mesh(self, choice: Choice) -> DeviceMesh:
        """Return the mesh of a choice, over the ranks of all. Collective the first time."""
        with torch.inference_mode(False):  # a mesh outlives the forward that asks for it
            return self._meshes.of(choice.shape)
