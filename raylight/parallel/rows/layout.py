"""Which rows of an image are on which rank, along one dimension of a tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from ..partition import divide
from ..shares import Weights

Span = tuple[int, int]  # rows from start up to stop


@dataclass(frozen=True, slots=True)
class Cuts:
    """Contiguous rows of all ranks: rank r owns rows `bounds[r]` to `bounds[r + 1]`."""

    bounds: tuple[int, ...]

    @property
    def total(self) -> int:
        """The number of rows on all ranks together."""
        return self.bounds[-1]

    @property
    def spans(self) -> tuple[Span, ...]:
        """The rows (start, stop) of each rank."""
        return tuple(pairwise(self.bounds))

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of rows of each rank."""
        return tuple(stop - start for start, stop in self.spans)

    def scaled(self, factor: int) -> Cuts:
        """Return the cuts of an image with `factor` rows for each row of this one."""
        return Cuts(tuple(bound * factor for bound in self.bounds))

    def divided(self, factor: int) -> Cuts:
        """Invert `scaled`. Raises ValueError: a cut falls between rows that become one."""
        if any(bound % factor for bound in self.bounds):
            raise ValueError(f"rows cut at {self.bounds} cannot be joined by {factor}: a cut would fall into a row")
        return Cuts(tuple(bound // factor for bound in self.bounds))


def cut(total: int, ranks: int, unit: int = 1, weights: Weights = (), least: int = 1) -> Cuts:
    """Cut `total` rows over `ranks` as evenly, or as close to `weights`, as multiples of `unit` allow; the last rank
    has the remainder. `least` is the smallest number of units for a rank, where there are weights.

    >>> cut(90, 4, 8).bounds
    (0, 24, 48, 72, 90)
    """
    inner = list(accumulate(divide(total // unit, ranks, weights, least), initial=0))
    return Cuts((*(bound * unit for bound in inner[:-1]), total))


@dataclass(frozen=True, slots=True)
class Rows:
    """Where a tensor's rows are.

    Dimension `dim`, counted from the end (below 0), is `outer` x rows: (T, H) flattened has an `outer` of T. What is
    flattened behind rows counts as more rows: (H, W) as tokens are H * W of them, cut where the rows are. A rank's
    tensor has its rows by `cuts`, or, if `held` is given, rows `held[r]`, which are those and copies of its
    neighbours' next ones.
    """

    dim: int
    cuts: Cuts
    outer: int = 1
    held: tuple[Span, ...] | None = None

    @property
    def spans(self) -> tuple[Span, ...]:
        """The rows in each rank's tensor."""
        return self.cuts.spans if self.held is None else self.held

    def scaled(self, factor: int) -> Rows:
        """Return the layout of a tensor with `factor` rows for each row of this one."""
        held = self.held and tuple((start * factor, stop * factor) for start, stop in self.held)
        return replace(self, cuts=self.cuts.scaled(factor), held=held)

    def divided(self, factor: int) -> Rows:
        """Invert `scaled`. Raises ValueError: a cut falls between rows that become one."""
        for bound in (bound for span in self.held or () for bound in span):
            if bound % factor:
                raise ValueError(f"rows {self.held} cannot be joined by {factor}: a rank would have part of a row")
        held = self.held and tuple((start // factor, stop // factor) for start, stop in self.held)
        return replace(self, cuts=self.cuts.divided(factor), held=held)
