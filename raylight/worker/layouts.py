"""How the ranks divide a forward: which of them have which batch rows, and which split the tokens of a row.

The layout follows from the forward's batch alone, so that all ranks have the same one without asking each other.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from torch.distributed.device_mesh import DeviceMesh

from raylight.host.jobs import Inside
from raylight.parallel.batch import BatchAxis
from raylight.parallel.degrees import DegreesByRun, Limits
from raylight.parallel.mesh import sequence_axis
from raylight.parallel.sequence_attention import Kernel, Strategy
from raylight.parallel.sequence_parallel import SequenceGroup

logger = logging.getLogger(__name__)

# Makes the strategy by which the ranks of a mesh exchange tokens.
StrategyOn = Callable[[DeviceMesh], Strategy]
Tell = Callable[[str], None]


class RowsAre(Enum):
    """How the batch rows of a forward depend on each other."""

    INDEPENDENT = "independent"
    PATCHED = "seen by patches of nodes, most of which treat each by itself"
    TOGETHER = "computed with each other"


@dataclass(frozen=True, slots=True)
class Layout:
    """`batch` divides the rows of a forward; None if every rank has all rows. `sequence` splits their tokens; None if
    the model's tokens are never split.
    """

    batch: BatchAxis | None
    sequence: SequenceGroup | None


class Layouts(Protocol):
    """The layouts of one model's forwards."""

    @abstractmethod
    def of(self, rows: int, rows_are: RowsAre) -> Layout:
        """Return the layout of a forward of `rows` batch rows."""

    @abstractmethod
    def of_own_run(self) -> Layout:
        """Return the layout of forwards of a run that a group of the batch axis does by itself."""


class GivenLayouts(Layouts):
    """Those of given degrees: rows are divided over the batch axis if there is one for each group. If not, tokens are
    split over all ranks.
    """

    def __init__(self, batch: BatchAxis, independent_rows: bool) -> None:
        """Divide rows over `batch`, unless the model's rows depend on each other."""
        self._batch, self._independent_rows = batch, independent_rows
        self._sequence: SequenceGroup | None = None
        self._all_ranks: SequenceGroup | None = None
        self._logged: set[str] = set()

    def use(self, sequence: SequenceGroup, all_ranks: SequenceGroup | None) -> None:
        """Split tokens over `sequence` in forwards that divide their rows, and over `all_ranks` in the others."""
        self._sequence, self._all_ranks = sequence, all_ranks

    def of(self, rows: int, rows_are: RowsAre) -> Layout:
        can_divide = self._independent_rows and rows_are is not RowsAre.TOGETHER
        divides = can_divide and self._batch.can_split(rows)
        self._log(rows, divides, can_divide)
        if divides or self._all_ranks is None:
            return Layout(self._batch if divides else None, self._sequence)
        return Layout(None, self._all_ranks)

    def of_own_run(self) -> Layout:
        return Layout(None, self._sequence)

    def _log(self, total: int, splits: bool, can_divide: bool) -> None:
        """Log once what is done with batches of a size."""
        too_small = f"a batch of {total} is too small for {self._batch.degree} groups of workers"
        if not can_divide:
            too_small = f"the rows of a batch of {total} depend on each other"
        if splits:
            message = f"a batch of {total} is split over the workers"
        elif self._all_ranks is not None:
            message = f"{too_small}: its tokens are split over all of them instead"
        else:
            message = f"{too_small}, and its tokens cannot be split over all of them: each group does the same work"
        if message not in self._logged:
            self._logged.add(message)
            logger.info(message)


class ChosenLayouts(Layouts):
    """Those that are chosen for each number of rows, each on a mesh of its own."""

    def __init__(self, by_run: DegreesByRun, heads: int | None, independent_rows: bool) -> None:
        """`heads` are the model's attention heads, None if its tokens cannot be split. The model's rows depend on each
        other unless `independent_rows`.
        """
        self._by_run, self._heads, self._independent_rows = by_run, heads, independent_rows
        self._may_divide = independent_rows
        self._limits = Limits(heads)
        self._strategy: StrategyOn | None = None
        self._own_run: DeviceMesh | None = None
        self._layouts: dict[int, tuple[DeviceMesh, Layout]] = {}
        self._told: dict[tuple[int, bool], str] = {}
        self._tell: Tell = lambda _: None

    def use(self, kernel: Kernel, strategy: StrategyOn, inside: Inside, may_ring: bool) -> None:
        """Exchange tokens by `strategy` around `kernel` from now on, or keep them full, as code `inside` of the model
        needs. Such code sees all rows too, as it does in one process.
        """
        full_tokens = bool(inside.full_tokens_for)
        heads = None if full_tokens else self._heads
        self._may_divide = self._independent_rows and inside == Inside()
        self._limits = Limits(heads, may_ring and hasattr(kernel, "with_lse"))
        self._strategy = None if full_tokens else strategy
        self._layouts.clear()

    def tell(self, tell: Tell, begins_run: bool) -> None:
        """Report each choice by `tell` from now on, once per run; `begins_run` forgets those of the last run."""
        self._tell = tell
        if begins_run:
            self._told.clear()

    def mesh_for(self, runs: int, full_tokens: bool, tell: Tell) -> DeviceMesh:
        """Return the mesh whose batch axis divides several runs, and have groups do theirs on it. Collective."""
        # Attention that nodes have put into the runs is not known yet, and may not be able to use a ring.
        limits = Limits(None if full_tokens else self._heads, may_ring=self._by_run.arrangement.mesh.ring > 1)
        choice = self._by_run.choose(runs, limits, "run")
        self._own_run = self._by_run.mesh(choice)
        if choice.splits_rows:
            tell(str(choice))
        return self._own_run

    def of(self, rows: int, rows_are: RowsAre) -> Layout:
        divides = self._may_divide and rows_are is RowsAre.INDEPENDENT
        rows = rows if divides and rows > 1 else 1
        choice = self._by_run.choose(rows, self._limits, "row" if divides else "undivided batch")
        mesh = self._by_run.mesh(choice)
        known = self._layouts.get(rows)
        if known is None or known[0] is not mesh:
            batch = BatchAxis(mesh.get_group("batch")) if choice.splits_rows else None
            known = self._layouts[rows] = mesh, Layout(batch, self._sequence(mesh))
        if (rows, divides) not in self._told:
            self._told[rows, divides] = str(choice)
            self._tell("; ".join(self._told.values()))
        return known[1]

    def of_own_run(self) -> Layout:
        assert self._own_run is not None, "runs of groups have a mesh"
        return Layout(None, self._sequence(self._own_run))

    def _sequence(self, mesh: DeviceMesh) -> SequenceGroup | None:
        if self._heads is None:
            return None
        if self._strategy is None:
            return SequenceGroup.single_rank()
        return SequenceGroup.of(sequence_axis(mesh).get_group(), self._strategy(mesh))


def given(mesh: DeviceMesh, independent_rows: bool) -> GivenLayouts | None:
    """Return the layouts of a mesh, None if it has no batch axis: then all forwards have the same one. The model's rows
    depend on each other unless `independent_rows`.
    """
    batch = BatchAxis(mesh.get_group("batch"))
    return GivenLayouts(batch, independent_rows) if batch.degree > 1 else None
