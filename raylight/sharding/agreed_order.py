"""The order in which ranks gather units while each does a forward of its own, which may enter other blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.distributed as dist

from raylight.parallel.process_group import smallest_of_each

from .unit_weights import UnitWeights


class AgreedOrder:
    """What is gathered next in forwards that begin and end together. Blocks of one size look alike to a collective, so
    ranks ask each other before each: the unit that is listed first of those that they need comes first, for all of
    them. Every rank asks until none needs any, so none waits for another one for ever.
    """

    def __init__(self, listed: Sequence[UnitWeights], group: dist.ProcessGroup) -> None:
        """Begin with the order in which the units are `listed`, the same on all ranks of `group`."""
        self._listed, self._group = listed, group
        # As in one process the next forward most likely has the order of the last one. Both are the same on all ranks.
        self._last, self._order = list(listed), list[UnitWeights]()
        # A compiled model has it in its hooks.
        self.next = cast("Callable[[UnitWeights | None, int], list[UnitWeights]]", torch.compiler.disable(self._next))

    def begin(self) -> None:
        """Begin a forward."""
        self._order = []

    def _next(self, wanted: UnitWeights | None, room: int) -> list[UnitWeights]:
        """Return which units have to be gathered now, and stay until this is called again: first one that some rank
        needs, then those that most likely follow, as many as every rank has `room` for. None if no rank needs any more
        in this forward. Collective, on the CPU.

        This rank needs what is `wanted`, or none any more.
        """
        none = len(self._listed)
        place, least = smallest_of_each([none if wanted is None else self._listed.index(wanted), room], self._group)
        if place == none:
            self._last = self._order or self._last
            return []
        self._order.append(self._listed[place])
        return list(dict.fromkeys([self._listed[place], *self._following(place)]))[:least]

    def _following(self, place: int) -> list[UnitWeights]:
        """Return what most likely follows the unit at this place of the list."""
        number = len(self._order)
        if number <= len(self._last) and self._last[number - 1] is self._listed[place]:
            return self._last[number:]
        return list(self._listed[place + 1 :])
