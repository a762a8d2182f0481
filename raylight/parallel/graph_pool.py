"""The graphs of a device, of all models on it: how many there may be, and which goes when room is needed."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from torch import Tensor

from . import heartbeat
from .graph_capture import Backend, Captured, Cost
from .graph_constants import Constants

LARGEST_NUMBER = 8  # of graphs on one device


@dataclass(slots=True)
class Recording:
    """What an ordinary forward has shown: the options that it `reads` and what they were, what it copied to the device,
    and what it took.
    """

    reads: frozenset[str]
    options: Hashable
    constants: Constants
    cost: Cost


@dataclass(slots=True, eq=False)
class Graph:
    """A captured forward, the `inputs` that it reads, tensors from `outside` that must live as long, and the signs of
    life that a replay gives.
    """

    recording: Recording
    inputs: list[Tensor]
    captured: Captured
    outside: list[Tensor]
    signs: heartbeat.Signs


@dataclass(slots=True, eq=False)
class Kind:
    """Forwards with inputs of one outline."""

    refused: bool = False
    crowded_out: int = 0
    forwards: int = 0
    recordings: int = 0
    recording: Recording | None = None
    graphs: list[Graph] = field(default_factory=list)


class GraphPool:
    """The graphs of one device, of all its models, the least recently used first."""

    def __init__(self, backend: Backend, largest_number: int = LARGEST_NUMBER) -> None:
        self.backend = backend
        self.replays = 0
        self._largest_number = largest_number
        self._graphs: OrderedDict[int, tuple[Graph, Kind]] = OrderedDict()
        _pools.add(self)

    def __len__(self) -> int:
        return len(self._graphs)

    def use(self, graph: Graph) -> None:
        """Take note that a graph is replayed."""
        self.replays += 1
        self._graphs.move_to_end(id(graph))

    def add(self, graph: Graph, kind: Kind) -> None:
        """Hold a new graph."""
        kind.graphs.append(graph)
        self._graphs[id(graph)] = graph, kind

    def make_room(self) -> None:
        """Drop the least recently used graph if there are as many as may be."""
        while len(self._graphs) >= self._largest_number:
            self._drop([next(iter(self._graphs))], crowded_out=True)

    def make_all_room(self) -> None:
        """Drop all graphs for another that needs their memory."""
        self._drop(list(self._graphs), crowded_out=True)

    def drop(self, kinds: Iterable[Kind]) -> None:
        """Drop all graphs of these kinds."""
        self._drop([id(graph) for kind in kinds for graph in kind.graphs])

    def drop_all(self) -> None:
        """Drop all graphs."""
        self._drop(list(self._graphs))

    @property
    def held_bytes(self) -> int:
        """The bytes that graphs keep to themselves."""
        return self.backend.held_bytes

    def _drop(self, keys: list[int], crowded_out: bool = False) -> None:
        for key in keys:
            graph, kind = self._graphs.pop(key)
            kind.graphs.remove(graph)
            # Its constants are recorded once more, should it be wanted again.
            kind.recording, kind.forwards, kind.recordings = None, 0, 0
            kind.crowded_out += crowded_out
            del graph
        if keys and not self._graphs:
            self.backend.released()


_pools: weakref.WeakSet[GraphPool] = weakref.WeakSet()


def drop_all() -> None:
    """Drop all graphs of this process, before a process group ends: NCCL would wait for ever for those with its
    collectives in them.
    """
    for pool in tuple(_pools):
        pool.drop_all()
