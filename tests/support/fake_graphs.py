"""Graphs without a GPU: a backend that captures nothing, and replays by calling the function that it was to capture.

The function reads the static inputs, so everything but CUDA's own part is as on a GPU. What it chooses on the host is
undone: a replay on a GPU runs no Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from raylight.parallel import graph_inputs
from raylight.parallel.graph_capture import Cost
from raylight.parallel.sequence_parallel import SequenceGroup, SequenceParallel

CPU = torch.device("cpu")


@contextmanager
def cpu_as_device() -> Iterator[None]:
    """Within it tensors in system memory are a graph's own."""
    graph_inputs.treat_cpu_as_device()
    try:
        yield
    finally:
        graph_inputs.treat_cpu_as_device(False)


class FakeBackend:
    """Counts captures and replays; fails at capture by `fails`; lacks memory while graphs hold more than `room`."""

    device = CPU

    def __init__(self) -> None:
        self.captures = self.replays = self.releases = 0
        self.fails: Exception | None = None
        self.room = 1000
        self.cost = Cost(1.0, 1.0, 1)
        self.held_bytes = 0

    def measured(self, function: Callable[[], Any]) -> tuple[Any, Cost]:
        return function(), self.cost

    def shortage(self, cost: Cost) -> int:
        return max(0, self.held_bytes + cost.peak_bytes - self.room)

    def released(self) -> None:
        self.releases, self.held_bytes = self.releases + 1, 0

    def capture(self, function: Callable[[], Any]) -> Any:
        self.captures += 1
        if self.fails is not None:
            torch.rand(1)  # a capture may have drawn numbers before it failed
            raise self.fails
        self.held_bytes += self.cost.peak_bytes
        return _Replayed(self, function)


def forbid_captures(model: nn.Module, backend: Any) -> RemovableHandle | None:
    """Let every capture of a model fail, until the handle is removed if there is one."""
    if isinstance(backend, FakeBackend):
        backend.fails = RuntimeError("this rank cannot capture")
        return None
    return next(model.children()).register_forward_pre_hook(_wait_in_capture)


def _wait_in_capture(*_: Any) -> None:
    if torch.cuda.is_current_stream_capturing():
        torch.ones(1, device="cuda").item()


@dataclass(frozen=True)
class _Replayed:
    backend: FakeBackend
    function: Callable[[], Any]

    def replay(self) -> Any:
        self.backend.replays += 1
        with _choices_undone():
            return self.function()


@contextmanager
def _choices_undone() -> Iterator[None]:
    """Afterwards tokens are split as before."""
    before: list[tuple[SequenceParallel, SequenceGroup]] = []
    use = SequenceParallel.use

    def noted(split: SequenceParallel, group: SequenceGroup) -> None:
        own = split.tokens
        before.append((split, SequenceGroup(split.attention.strategy, own.group, own.rank, own.degree, own.weights)))
        use(split, group)

    SequenceParallel.use = noted
    try:
        yield
    finally:
        SequenceParallel.use = use
        for split, group in reversed(before):
            split.use(group)
