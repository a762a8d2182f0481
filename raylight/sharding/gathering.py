"""Gather the sharded weights of a model's units as its forward needs them, and let go of them again. No gradients.

All units share a few buffers. Each weight of a unit is gathered to its place in a buffer, so nothing is copied out of
it, and is a parameter of its module only while the unit runs: before and after, the parameter is the shard. The next
units are gathered on a stream of their own while one runs.

This is the unshard and reshard of FSDP2 (Zhao et al., 2023, "PyTorch FSDP") for inference, at a fraction of what it
costs the host, and it can be part of a CUDA graph: streams are forked from and joined to the current one, and nothing
waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .gather_buffers import Buffer
from .gatherer import Gatherer
from .unit_weights import UnitWeights

AHEAD = 2  # units that are gathered ahead
AHEAD_OFFLOADED = 1  # who keeps weights in system memory is short of a GPU's


class Gathering:
    """The units of one model, which are gathered in its forwards. Collective: all ranks run the same forwards."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[tuple[nn.Module, UnitWeights]],
        rest: UnitWeights,
        group: dist.ProcessGroup,
        device: torch.device,
        methods: Iterable[str],
    ) -> None:
        """Install hooks. `rest` are the weights outside of blocks, held for a whole forward, and in `methods` of the
        model that are called beside it.
        """
        self._model, self._rest = model, rest
        self._listed = [weights for _, weights in blocks]
        staged_bytes = max(one.staged_bytes for one in (*self._listed, rest))
        self._gatherer = Gatherer(group, device, staged_bytes)
        self._ahead = AHEAD_OFFLOADED if any(one.is_offloaded for one in (*self._listed, rest)) else AHEAD
        largest = max((one.full_bytes for one in self._listed), default=0)
        self._buffers = [Buffer(largest) for _ in range(min(1 + self._ahead, len(blocks)))]
        self._rest_buffer = Buffer(rest.full_bytes)
        self._depth = 0
        self._in_forward = False
        self._running: list[UnitWeights] = []
        self._turn = 0
        # The order of the last forward, which the next one will most likely have, and this one's so far.
        self._last: list[UnitWeights] = self._listed
        self._order: list[UnitWeights] = []
        self._is_steady = False
        self._steady: list[UnitWeights] | None = None  # the order that all forwards are expected to have then
        model.register_forward_pre_hook(self._enter_model)
        model.register_forward_hook(self._leave_model, always_call=True)
        for module, weights in blocks:
            module.register_forward_pre_hook(self._entering(weights))
            module.register_forward_hook(self._leaving(weights), always_call=True)
        for name in methods:
            if hasattr(model, name):
                setattr(model, name, self._holding(getattr(model, name)))

    def reset(self) -> None:
        """Let every parameter be its shard again, after a forward that did not end."""
        self._depth, self._in_forward = 0, False
        self._end()

    def keep_steady(self, on: bool) -> None:
        """With `on`, let a forward gather the same in the same order whatever ran before it: a rank that replays it as
        a CUDA graph gathers what it did at its capture, beside ranks that do not. All of them are then expected to have
        the order of the first one that ran so. The same on all ranks.
        """
        self._is_steady = on

    def _enter_model(self, *_: Any) -> None:
        if self._in_forward:  # the last one was ended by what is no Exception, of which hooks are not told
            self.reset()
        self._in_forward = True
        if self._depth == 0:
            self._begin()
            self._gather_ahead(self._expected[: self._ahead])
        self._depth += 1

    def _leave_model(self, *_: Any) -> None:
        self._in_forward = False
        self._release()

    def _release(self) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth == 0:
            self._end()

    def _holding(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def held(*args: Any, **kwargs: Any) -> Any:
            if self._depth == 0:
                self._begin()
            self._depth += 1
            try:
                return method(*args, **kwargs)
            finally:
                self._release()

        return held

    def _entering(self, weights: UnitWeights) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            if self._is_alone:
                self._gatherer.begin()
            buffer = self._gathered(weights, [])
            self._gatherer.wait(buffer)
            weights.show(buffer)
            self._running.append(weights)
            self._order.append(weights)
            if self._depth:
                self._gather_ahead(self._following(weights))

        return enter

    def _leaving(self, weights: UnitWeights) -> Callable[..., None]:
        def leave(*_: Any) -> None:
            if weights in self._running:
                weights.hide()
                self._running.remove(weights)
            if self._is_alone:
                self._order = []  # of no forward
                self._end()

        return leave

    @property
    def _is_alone(self) -> bool:
        """Whether a block is called by itself, outside of the model."""
        return self._depth == 0 and not self._running

    def _begin(self) -> None:
        self._order = []
        self._gatherer.begin()
        self._rest_buffer.allocate(self._gatherer.device)
        self._gatherer.start(self._rest, self._rest_buffer)
        self._gatherer.wait(self._rest_buffer)
        self._rest.show(self._rest_buffer)

    def _end(self) -> None:
        for weights in (*self._running, self._rest):
            weights.hide()
        self._running.clear()
        if self._order and not self._is_steady:
            self._last = self._order
        elif self._order and self._steady is None:
            self._steady = self._order
        self._order, self._turn = [], 0
        buffers = [self._rest_buffer, *self._buffers]
        self._gatherer.end(buffers)

    @property
    def _expected(self) -> list[UnitWeights]:
        return self._steady if self._is_steady and self._steady is not None else self._last

    def _following(self, weights: UnitWeights) -> list[UnitWeights]:
        """Return the units that will be entered next."""
        expected, place = self._expected, len(self._order) - 1
        if place < len(expected) and expected[place] is weights:
            return expected[place + 1 : place + 1 + self._ahead]
        place = self._listed.index(weights)
        return self._listed[place + 1 : place + 1 + self._ahead]

    def _gather_ahead(self, following: list[UnitWeights]) -> None:
        room = len(self._buffers) - len(self._running)
        for weights in following[:room]:
            self._gathered(weights, following)

    def _gathered(self, weights: UnitWeights, needed: list[UnitWeights]) -> Buffer:
        """Return the buffer that has, or will have, the weights of a unit. Start to gather them if none does, into one
        that has none of the `needed` units.
        """
        for buffer in self._buffers:
            if buffer.holds is weights:
                return buffer
        for _ in self._buffers:
            buffer = self._buffers[self._turn]
            self._turn = (self._turn + 1) % len(self._buffers)
            if buffer.holds is None or (buffer.holds not in self._running and buffer.holds not in needed):
                if buffer.holds is None:
                    buffer.allocate(self._gatherer.device)
                self._gatherer.start(weights, buffer)
                return buffer
        raise RuntimeError("blocks with sharded weights are nested more deeply than there are buffers")
