"""Which rows of an image are on which rank, along one dimension of a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

from ..partition import partition


@dataclass(frozen=True, slots=True)
class Cuts:
    """Contiguous rows of all ranks: rank r owns rows `bounds[r]` to `bounds[r + 1]`."""

    bounds: tuple[int, ...]

    @property
    def total(self) -> int:
        """The number of rows on all ranks together."""
        return self.bounds[-1]

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
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
        """Invert `scaled`. Raises ValueError: a cut falls between two rows."""
        if any(bound % factor for bound in self.bounds):
            raise ValueError(f"rows cut at {self.bounds} cannot be joined by {factor}: a cut would fall into a row")
        return Cuts(tuple(bound // factor for bound in self.bounds))


def cut(total: int, ranks: int, unit: int = 1) -> Cuts:
    """Cut `total` rows over `ranks` as evenly as multiples of `unit` allow; the last rank has the remainder.

    >>> cut(90, 4, 8).bounds
    (0, 24, 48, 72, 90)
    """
    inner = list(accumulate(partition(total // unit, ranks), initial=0))
    return Cuts((*(bound * unit for bound in inner[:-1]), total))
