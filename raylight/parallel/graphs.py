"""Forwards of a model as graphs: when one is captured, when it is replayed, and when the forward runs as it is.

The first forward of a kind runs as it is: ranks connect, libraries plan, kernels are compiled. The second is recorded
while it runs: which options it reads, which constants it copies to the GPU, what a graph could not have, and what it
takes. At the third its GPU work is captured, collectives included, and replayed from then on.

Each rank decides by itself. A capture executes nothing, and a replay executes the collectives of the forward in their
order; so it does not matter to the others whether a rank replays.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import graph_inputs, heartbeat
from .graph_constants import recorded, supplied
from .graph_inputs import NotStaticError, WatchedOptions
from .graph_pool import Graph, GraphPool, Kind, Recording

logger = logging.getLogger(__name__)

AUTO, ON, OFF = "auto", "on", "off"
NAMES = (AUTO, ON, OFF)

_KINDS = 64  # of forwards whose fate is remembered
_RECORDINGS = 3  # of one kind, whose options differ each time
_CROWDED_OUT = 2  # how often a graph may have to go for others
_LEAST_LAUNCH_SHARE = 0.25  # of a recorded forward, whose launch takes two to three times as long as usual
_LARGEST_CONSTANTS = 2**30  # bytes

Forward = Callable[[tuple[Any, ...], dict[str, Any], dict[str, Any]], Any]


class ForwardGraphs:
    """The forwards of one model."""

    def __init__(self, name: str, forward: Forward, reset: Callable[[], None], pool: GraphPool) -> None:
        """`forward` runs the model, with its positional arguments, its named ones, and its options. `reset` brings what
        the model keeps during a forward back to the start, after a capture that has failed in its midst.
        """
        self._name, self._forward, self._reset, self._pool = name, forward, reset, pool
        self._kinds: OrderedDict[Hashable, Kind] = OrderedDict()
        self._logged: set[str] = set()

    @property
    def device(self) -> torch.device:
        """Where graphs run."""
        return self._pool.backend.device

    @property
    def holds_any(self) -> bool:
        """Whether there is any graph."""
        return any(kind.graphs for kind in self._kinds.values())

    @property
    def expects_any(self) -> bool:
        """Whether there are graphs, or may soon be: not of forwards that are all refused, or too few of a kind."""
        kinds = self._kinds.values()
        return any(kind.graphs or kind.recording for kind in kinds) or not any(kind.refused for kind in kinds)

    @property
    def reasons(self) -> frozenset[str]:
        """Why forwards have run as they are, as logged."""
        return frozenset(self._logged)

    def clear(self) -> None:
        """Drop all graphs, and forget what is known of forwards."""
        self._pool.drop(self._kinds.values())
        self._kinds.clear()

    def log(self, reason: str) -> None:
        """Log once why forwards run as they are."""
        if reason not in self._logged:
            self._logged.add(reason)
            logger.info("CUDA graphs: %s runs without: %s", self._name, reason)

    def call(
        self,
        context: Hashable,
        keeps: Callable[[], Iterable[Tensor]],
        always: bool,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: dict[str, Any],
    ) -> Any:
        """Run a forward, or replay it.

        `context` is what it depends on beside its arguments. `keeps` returns tensors that outlive every graph: weights.
        With `always` it is captured even if that gains little.
        """
        if torch.is_grad_enabled():
            return self._forward(args, kwargs, options)
        try:
            outline, tensors = graph_inputs.outline((args, kwargs))
            kind = self._kind((context, torch.is_inference_mode_enabled(), outline))
            if kind.refused:
                return self._forward(args, kwargs, options)
            if (found := self._found(kind, options)) is not None:
                return self._replay(found[0], [*tensors, *found[1]])
            recording = kind.recording
            if recording is not None:
                read, more = graph_inputs.outline_read(options, recording.reads)
                if read == recording.options:
                    graph = self._capture(kind, recording, args, kwargs, options, [*tensors, *more], keeps)
                    if graph is not None:
                        return self._replay(graph, [*tensors, *more])
                    return self._forward(args, kwargs, options)
        except NotStaticError as reason:
            self.log(str(reason))
            return self._forward(args, kwargs, options)
        kind.forwards += 1
        if kind.forwards == 1:
            return self._forward(args, kwargs, options)
        return self._record(kind, args, kwargs, options, always, keeps)

    @staticmethod
    def _found(kind: Kind, options: dict[str, Any]) -> tuple[Graph, list[Tensor]] | None:
        """Return the graph of a forward with these options, and the tensors among those that it reads."""
        for graph in kind.graphs:
            read, tensors = graph_inputs.outline_read(options, graph.recording.reads)
            if read == graph.recording.options:
                return graph, tensors
        return None

    def _kind(self, key: Hashable) -> Kind:
        kind = self._kinds.pop(key, None) or Kind()
        self._kinds[key] = kind
        if len(self._kinds) > _KINDS:
            self._pool.drop([self._kinds.popitem(last=False)[1]])
        return kind

    def _refuse(self, kind: Kind, reason: str) -> None:
        kind.refused, kind.recording = True, None
        self.log(reason)

    def _record(
        self,
        kind: Kind,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: dict[str, Any],
        always: bool,
        keeps: Callable[[], Iterable[Tensor]],
    ) -> Any:
        """Run a forward while recording it."""
        backend, watched = self._pool.backend, WatchedOptions(options)
        before, given = _random_state(backend.device), graph_inputs.outline_each(options)
        with recorded(backend.device, keeps()) as recorder:
            result, cost = backend.measured(lambda: self._forward(args, kwargs, watched))
        after = _random_state(backend.device)
        kind.recordings += 1
        reads = frozenset(watched.reads)
        obstacle = recorder.obstacle
        if not obstacle and any(not torch.equal(one, two) for one, two in zip(before, after, strict=True)):
            obstacle = "it draws random numbers"
        if not obstacle and (changed := graph_inputs.changed(given, options, reads)):
            obstacle = f"it changes what it is given in its options ({', '.join(map(str, changed))})"
        if not obstacle and kind.recordings > _RECORDINGS:
            obstacle = f"what it reads of its options changes each time ({', '.join(sorted(map(str, reads)))})"
        if not obstacle and recorder.constants.bytes > _LARGEST_CONSTANTS:
            obstacle = f"it copies {recorder.constants.bytes / 1e9:.1f} GB from system memory to the GPU each time"
        if not obstacle and not always and cost.launch_s < _LEAST_LAUNCH_SHARE * cost.total_s:
            share = cost.launch_s / cost.total_s
            obstacle = f"it would gain little: the host launches a forward of {cost.total_s:.2f} s in {share:.0%} of it"
        if not obstacle:
            try:
                graph_inputs.copies_of(result, lambda tensor: tensor)
                read, _ = graph_inputs.outline_read(options, reads)
                kind.recording = Recording(reads, read, recorder.constants, cost)
            except NotStaticError as reason:
                obstacle = str(reason)
        if obstacle:
            self._refuse(kind, obstacle)
        return result

    def _capture(
        self,
        kind: Kind,
        recording: Recording,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: dict[str, Any],
        tensors: list[Tensor],
        keeps: Callable[[], Iterable[Tensor]],
    ) -> Graph | None:
        """Return a graph of this forward, None if it cannot be captured, which is logged."""
        backend = self._pool.backend
        if kind.crowded_out > _CROWDED_OUT:
            self._refuse(kind, "the GPU has no room for the graphs of all forwards that take turns")
            return None
        self._pool.make_room()
        if (missing := backend.shortage(recording.cost)) > 0:
            self._pool.make_all_room()
            missing = backend.shortage(recording.cost)
        if missing > 0:
            self._refuse(kind, f"{missing / 1e9:.1f} GB of GPU memory are missing to capture it")
            return None
        inputs = [graph_inputs.static_copy(tensor) for tensor in tensors]
        read = graph_inputs.read_of(options, recording.reads)
        outside: list[Tensor] = []

        def forward() -> Any:
            replace = iter(inputs)
            own_args, own_kwargs = graph_inputs.rebuilt((args, kwargs), replace)
            own = WatchedOptions(graph_inputs.present(graph_inputs.rebuilt(read, replace)))
            with supplied(recording.constants, backend.device, [*inputs, *keeps()]) as supplier:
                output = self._forward(own_args, own_kwargs, own)
            if not own.reads <= recording.reads:
                raise NotStaticError(f"it reads other options each time ({', '.join(map(str, own.reads))})")
            outside[:] = supplier.outside
            graph_inputs.copies_of(output, lambda tensor: tensor)
            return output

        state, before = torch.get_rng_state(), heartbeat.signs()
        try:
            captured = backend.capture(forward)
        except Exception as failure:  # whatever the model, a library or CUDA has against it
            torch.set_rng_state(state)
            heartbeat.take_back(before)
            self._reset()
            self._refuse(kind, f"it cannot be captured: {_first_line(failure)}")
            return None
        kind.recording = None
        graph = Graph(recording, inputs, captured, outside, heartbeat.take_back(before))
        self._pool.add(graph, kind)
        shapes = ", ".join("x".join(map(str, tensor.shape)) for tensor in inputs[:2])
        logger.info(
            "CUDA graphs: a forward of %s (%s) is captured; graphs hold %.2f GB of this GPU",
            self._name,
            shapes,
            self._pool.held_bytes / 1e9,
        )
        return graph

    def _replay(self, graph: Graph, tensors: list[Tensor]) -> Any:
        heartbeat.repeat(graph.signs)
        heartbeat.launched(self.device)
        self._pool.use(graph)
        for static, tensor in zip(graph.inputs, tensors, strict=True):
            graph_inputs.fill_static(static, tensor)
        return graph_inputs.copies_of(graph.captured.replay())


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
