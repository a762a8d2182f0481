"""Gathered weights that stay on the GPU between forwards, as far as forwards leave room for them.

Two forwards of each size are measured with nothing kept: the first may take what later ones do not, such as workspaces
of libraries. From then on as many units are kept as fit beside the largest forward of the run. A forward that is larger
than any measured one drops them before it begins, is measured, and they come back with the next.

A CUDA graph takes memory of its own, and knows where kept units are. So room is left for one, but where links are slow
and not all units would fit beside it: there weights that are gathered less save more time. Other units are kept only
after the graphs are dropped.

Ranks decide alike: what is decided by shapes is the same on all ranks, as all call the model with the same arguments,
and of the memory that is left they take the smallest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from comfy.model_management import minimum_inference_memory
from torch import Tensor

from raylight.cluster.errors import is_out_of_memory
from raylight.host.log_messages import gb
from raylight.host.patcher_state import OPTIONS
from raylight.parallel.graph_capture import MARGIN_BYTES
from raylight.parallel.process_group import any_rank, smallest
from raylight.sharding.gathering import Gathering

from .spare_memory import SpareMemory

logger = logging.getLogger(__name__)

_GROWTH = 1.1  # of what a forward takes, as memory is divided in another way each time
_MEASURED = 2  # forwards of a size, of which the last counts
_LOST, _UNKNOWN = -1, -2  # instead of a number of bytes: this rank no longer has what was kept, or did not measure
_STEP = 8  # a number is raised by at least the units divided by this, as every change costs time
_FORWARDS = 64  # sizes that are remembered
_MUCH = 2**62  # bytes


@dataclass(frozen=True, slots=True)
class _Forward:
    """What a forward's memory depends on: its kind, and the elements of each of its tensors."""

    kind: Hashable
    sizes: tuple[int, ...]

    def covers(self, other: _Forward) -> bool:
        """Return whether a forward takes no more than this one."""
        return self.kind == other.kind and all(
            own >= others for own, others in zip(self.sizes, other.sizes, strict=True)
        )


@dataclass(frozen=True, slots=True)
class GraphsOfJob:
    """Whether forwards of a job are `expected` to be CUDA graphs on this rank, and whether these `come_first`, before
    what is kept; the latter is the same on all ranks.
    """

    expected: Callable[[], bool] = lambda: False
    come_first: bool = False


NO_GRAPHS = GraphsOfJob()


class KeptUnits:
    """The kept units of one sharded model. All ranks call the same, with the same arguments but where it says so."""

    def __init__(self, name: str, gathering: Gathering, group: dist.ProcessGroup, memory: SpareMemory | None) -> None:
        """`group` has all ranks. Without `memory` nothing is ever kept."""
        self._name, self._gathering, self._group, self._memory = name, gathering, group, memory
        self._units = 1 + gathering.blocks
        self._may_keep = self._is_decided = self._has_lost = False
        self._context: Hashable = None
        self._split: Callable[[], Hashable] = lambda: None
        self._wanted: Callable[[], int] = lambda: 0
        self._graphs = NO_GRAPHS
        self._begun: dict[_Forward, int] = {}  # how often, with nothing kept
        self._taken: dict[_Forward, int] = {}  # bytes beside those of weights, if this rank has measured them
        self._seen: set[_Forward] = set()  # in this run
        self._seen_before: set[_Forward] = set()  # in the last one
        self._expected: set[_Forward] = set()  # what there has to be room for
        self._measuring: _Forward | None = None
        self._said = 0
        if memory is not None and gathering.kept_bytes(self._units):
            gathering.watch(self._before, self._after)

    @property
    def has_lost(self) -> bool:
        """Whether this rank, perhaps alone, no longer has what was kept."""
        return self._has_lost

    @property
    def bytes(self) -> int:
        """How many bytes the kept units take on this rank."""
        return self._gathering.kept_bytes(self._gathering.number)

    def begin(
        self,
        may_keep: bool,
        begins_run: bool,
        context: Hashable,
        split: Callable[[], Hashable],
        wanted: Callable[[], int],
        graphs: GraphsOfJob = NO_GRAPHS,
    ) -> None:
        """Begin a job: a run or one forward of a run. Unless it `may_keep` units, drop them.

        `context` is what the memory of its forwards depends on beside their arguments, and `split` returns that of
        what depends on the forward that begins; they may differ by rank, if they change together. `wanted` returns how
        many bytes have to be left on this rank beside what is kept.
        """
        if self._memory is None:
            return
        self._may_keep, self._is_decided = may_keep, False
        self._split, self._wanted, self._graphs = split, wanted, graphs
        if context != self._context:
            self._context = context
            self._forget_forwards()
        if begins_run:
            self._seen_before, self._seen, self._expected = self._seen, set(), set()
        if not may_keep:
            self.keep_none()

    def stop(self) -> None:
        """Keep nothing in this job."""
        self._may_keep = False
        self.keep_none()

    def forget(self) -> None:
        """Gather what is kept again: weights have changed, on all ranks."""
        self._gathering.forget()

    def release(self) -> int:
        """Drop what is kept, on this rank at least: before the next job ranks agree whether one `has_lost` it. Return
        how many bytes that frees.
        """
        freed = self.bytes
        if self._gathering.number:
            self._gathering.keep(0)
            self._has_lost, self._is_decided = True, False
        return freed

    def keep_none(self) -> None:
        """Drop what is kept, on all ranks."""
        if self._gathering.number:
            self._gathering.keep(0)
        self._has_lost = False

    def _before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether the forward that begins may be a CUDA graph: not one that is measured."""
        self._measuring = None
        if not self._may_keep or self._memory is None:
            return True
        forward = self._forward(args, kwargs)
        if not any(one.covers(forward) for one, times in self._begun.items() if times == _MEASURED):
            self._measure(forward, self._memory)
            return False
        if not self._seen and forward in self._seen_before:
            self._expected = set(self._seen_before)  # most likely the same run again
        self._seen.add(forward)
        if forward not in self._expected:
            self._expected.add(forward)
            self._is_decided = False
        if not self._is_decided:
            self._decide(self._memory)
        return True

    def _after(self, has_ended_well: bool) -> None:
        forward, self._measuring = self._measuring, None
        if forward is not None and self._memory is not None and has_ended_well:
            self._taken[forward] = max(0, self._memory.taken() - self._gathering.passing_bytes(0))

    def _measure(self, forward: _Forward, memory: SpareMemory) -> None:
        """Measure a forward that begins, with nothing kept. That it was is known to all ranks, also if it fails."""
        self.keep_none()
        self._is_decided = False
        if len(self._begun) == _FORWARDS:
            self._forget_forwards()
        self._begun[forward] = self._begun.get(forward, 0) + 1
        self._measuring = forward
        memory.begin()

    def _forget_forwards(self) -> None:
        for forwards in (self._begun, self._taken, self._seen, self._seen_before, self._expected):
            forwards.clear()

    def _forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Forward:
        options = kwargs.get(OPTIONS) or {}
        code = tuple(
            (kind, name)
            for kind in ("patches", "patches_replace", "wrappers")
            for name in sorted(map(str, (options.get(kind) or {})))
            if options[kind].get(name, True)
        )
        names, sizes = [], []
        for name, tensor in _tensors("", (args, {key: kwargs[key] for key in kwargs if key != OPTIONS})):
            names.append((name, tensor.dtype))
            sizes.append(tensor.numel())
        return _Forward((self._split(), code, tuple(names)), tuple(sizes))

    def _largest(self, forward: _Forward) -> int | None:
        """Return how many bytes a forward takes at most, None if this rank has measured none that covers it."""
        return min((taken for one, taken in self._taken.items() if one.covers(forward)), default=None)

    def _decide(self, memory: SpareMemory) -> None:
        """Keep as many units as every rank has room for. Collective."""
        self._is_decided = True
        agreed = smallest(_LOST if self._has_lost else self._room(memory), self._group)
        if agreed == _LOST:
            self.keep_none()
            agreed = smallest(self._room(memory), self._group)
        if agreed == _UNKNOWN:
            self.keep_none()
            self._forget_forwards()
            self._is_decided = False
            return
        number, before = self._fitting(agreed, self._agree_on_graphs(memory)), self._gathering.number
        if before < number < min(self._units, before + self._units // _STEP):
            number = before
        if number < before:
            self._gathering.keep(number)
        elif number > before:
            self._raise_to(number, memory)
        self._say()

    def _room(self, memory: SpareMemory) -> int:
        """Return how many bytes this rank has for weights that are kept, and for those that pass, or `_UNKNOWN`."""
        forward = self._expected_bytes()
        if forward is None:
            return _UNKNOWN
        must_stay = max(int(minimum_inference_memory() + _GROWTH * forward), self._wanted())
        return max(0, memory.left() + self.bytes - must_stay)

    def _expected_bytes(self) -> int | None:
        """Return how many bytes the largest expected forward takes, None if this rank has not measured it."""
        taken = [self._largest(one) for one in self._expected]
        return None if None in taken else max((one for one in taken if one is not None), default=0)

    def _agree_on_graphs(self, memory: SpareMemory) -> int | None:
        """Return how many bytes every rank has for weights beside graphs, None if no rank expects any. Collective."""
        own = _MUCH
        if self._graphs.expected():
            graph = int(_GROWTH * (self._expected_bytes() or 0)) + MARGIN_BYTES
            own = max(0, self._room(memory) - max(0, graph - memory.graphs()))
        agreed = smallest(own, self._group)
        return None if agreed == _MUCH else agreed

    def _fitting(self, room: int, beside_graphs: int | None) -> int:
        """Return how many units fit in so many bytes, or `beside_graphs` if these come first, or all units fit."""
        if beside_graphs is not None:
            number = self._most(min(room, beside_graphs), passes=1 + _GROWTH)
            if number == self._units or self._graphs.come_first:
                return number
        return self._most(room)

    def _most(self, room: int, passes: float = 1) -> int:
        """Return how many units fit in `room` bytes, if there are `passes` places for those that pass: a graph has its
        own.
        """
        for number in range(self._units, 0, -1):
            if self._gathering.kept_bytes(number) + int(passes * self._gathering.passing_bytes(number)) <= room:
                return number
        return 0

    def _raise_to(self, number: int, memory: SpareMemory) -> None:
        memory.tidy()
        failure = None
        try:
            self._gathering.keep(number)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = error
        if any_rank(failure is not None, self._group):  # another program was faster
            self.keep_none()

    def _say(self) -> None:
        number = self._gathering.number
        if number in (0, self._said):
            return
        self._said = number
        if dist.get_rank(self._group) == 0:
            blocks = self._gathering.blocks
            logger.info(
                "%s: %d of %d blocks stay gathered on each GPU, %s", self._name, number - 1, blocks, gb(self.bytes)
            )


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the tensors in an argument, with a name for each."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(f"{name}.{key}", item)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _tensors(f"{name}.{index}", item)
