"""Gather the sharded weights of a model's units as its forward needs them, and let go of them again. No gradients.

All units share a few buffers. Each weight of a unit is gathered to its place in a buffer, so nothing is copied out of
it, and is a parameter of its module only while the unit runs: before and after, the parameter is the shard. The next
units are gathered on a stream of their own while one runs. Units that are *kept* have buffers of their own: they are
gathered once, by the next forward that enters them, and stay there for later forwards.

This is the unshard and reshard of FSDP2 (Zhao et al., 2023, "PyTorch FSDP") for inference, at a fraction of what it
costs the host, and it can be part of a CUDA graph: streams are forked from and joined to the current one, and nothing
waits for the GPU. A graph knows where kept units are, and gathers the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .agreed_order import AgreedOrder
from .gather_buffers import Buffer
from .gatherer import Gatherer
from .unit_weights import UnitWeights

AHEAD = 2  # units that are gathered ahead
AHEAD_OFFLOADED = 1  # who keeps weights in system memory is short of a GPU's
_TOO_DEEP = "blocks with sharded weights are nested more deeply than there are buffers"

Before = Callable[[tuple[Any, ...], dict[str, Any]], bool]
"""What is called with the arguments of a forward before it begins, and tells whether it may be a CUDA graph."""
After = Callable[[bool], None]
"""What is called when a forward has ended, with whether it has a result and has run the blocks."""


class Gathering:
    """The units of one model, which are gathered in its forwards. Collective: all ranks run the same forwards, except
    `in_step`.
    """

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
        self._group = group
        self._staged_bytes = max(one.staged_bytes for one in (*self._listed, rest))
        self._gatherer = Gatherer(group, device, self._staged_bytes)
        self._ahead = AHEAD_OFFLOADED if any(one.is_offloaded for one in (*self._listed, rest)) else AHEAD
        self._largest = max((one.full_bytes for one in self._listed), default=0)
        self._buffers = [Buffer(self._largest) for _ in range(min(1 + self._ahead, len(blocks)))]
        self._rest_buffer = Buffer(rest.full_bytes)
        self._own = {rest: self._rest_buffer} | {one: Buffer(one.full_bytes) for one in self._listed}
        self._kept: dict[UnitWeights, Buffer] = {}
        self._number = 0
        self._watchers: list[tuple[Before, After]] = []
        self._depth = 0
        self._in_forward = self._is_announced = self._has_run = False
        self._running: dict[UnitWeights, Buffer] = {}
        self._turn = 0
        self._agreed: AgreedOrder | None = None  # while ranks are in step
        self._there: dict[UnitWeights, Buffer] = {}  # what all ranks have, as they have agreed
        # The order of the last forward, which the next one will most likely have, and this one's so far.
        self._last: list[UnitWeights] = self._listed
        self._order: list[UnitWeights] = []
        self._is_steady = False
        self._steady: list[UnitWeights] | None = None  # the order that all forwards are expected to have then
        self._drop_graphs: Callable[[], None] = lambda: None
        model.register_forward_pre_hook(self._enter_model, with_kwargs=True)
        model.register_forward_hook(self._leave_model, always_call=True)
        for module, weights in blocks:
            module.register_forward_pre_hook(self._entering(weights))
            module.register_forward_hook(self._leaving(weights), always_call=True)
        for name in methods:
            if hasattr(model, name):
                setattr(model, name, self._holding(getattr(model, name)))

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return len(self._listed)

    @property
    def number(self) -> int:
        """How many units are kept."""
        return self._number

    def keep(self, number: int) -> None:
        """Keep so many units from one forward to the next: none, or what is outside of blocks, then blocks, evenly
        spread, so that there is time to gather those between them. The same on all ranks, between forwards.

        Those that were kept before and no longer are give their memory back; the others take theirs now. Raises
        torch.OutOfMemoryError: when there is none; then some have it, and fewer must be kept.
        """
        if self._in_forward or self._depth:  # the last forward was ended by what hooks are not told of
            self.reset()
        chosen = self._chosen(number)
        if chosen != self._kept.keys():
            self._drop_graphs()
        for weights in [one for one in self._kept if one not in chosen]:
            self._kept.pop(weights).free()
        self._number = number
        for weights in chosen:
            if weights not in self._kept:
                self._own[weights].allocate(self._gatherer.device)
                self._kept[weights] = self._own[weights]

    def forget(self) -> None:
        """Gather what is kept again in the next forward: weights have changed. On all ranks."""
        for buffer in self._kept.values():
            buffer.holds = None

    @contextmanager
    def announced(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[bool]:
        """Let the forward within be one that hooks may not see, as it may be the replay of a CUDA graph. Give whether
        it may. What is kept is gathered before it, and who watches is told of it here. Collective.
        """
        if self._in_forward:  # as in `_enter_model`
            self.reset()
        if self._depth:  # within a method that holds weights
            yield False
            return
        may_replay = self._begin_watched(args, kwargs)
        if may_replay:
            self._gather_kept()
        self._is_announced, has_result = True, False
        try:
            yield may_replay
            has_result = True
        finally:
            self._is_announced = False
            self._end_watched(has_result)

    def _gather_kept(self) -> None:
        """Gather what is kept and not there."""
        in_order = [one for one in (self._rest, *self._listed) if one in self._kept]  # the same on all ranks
        missing = [one for one in in_order if self._kept[one].holds is not one]
        for weights in missing:
            self._gatherer.start(weights, self._kept[weights])
        if missing:
            self._gatherer.end([], self._kept.values())

    def kept_bytes(self, number: int) -> int:
        """Return how many bytes so many kept units take, between forwards too."""
        return sum(one.full_bytes for one in self._chosen(number))

    def passing_bytes(self, number: int) -> int:
        """Return how many bytes units take only during a forward if so many are kept."""
        rest = 0 if number else self._rest.full_bytes
        buffers = 0 if number > self.blocks else len(self._buffers) * self._largest
        return rest + buffers + self._staged_bytes

    def watch(self, before: Before, after: After) -> None:
        """Call these before each forward of the model, where `keep` may be called, and after it."""
        self._watchers.append((before, after))

    def _chosen(self, number: int) -> set[UnitWeights]:
        blocks = min(number - 1, self.blocks)
        spread = {self._listed[index * self.blocks // blocks] for index in range(blocks)}
        return spread | {self._rest} if number > 0 else set()

    def reset(self) -> None:
        """Let every parameter be its shard again, after a forward that did not end."""
        self._depth, self._in_forward = 0, False
        self._end()

    def keep_steady(self, on: bool, drop_graphs: Callable[[], None]) -> None:
        """With `on`, let a forward gather the same in the same order whatever ran before it: a rank that replays it as
        a CUDA graph gathers what it did at its capture, beside ranks that do not. All of them are then expected to have
        the order of the first one that ran so. The same on all ranks. `drop_graphs` is called before other units are
        kept than the graphs know of.
        """
        self._is_steady, self._drop_graphs = on, drop_graphs

    @contextmanager
    def in_step(self) -> Iterator[Callable[[], None]]:
        """Let ranks do forwards of their own within this context, which may enter other blocks in another order. They
        begin together: a rank without one calls what this gives instead. Nothing is kept. On all ranks.
        """
        self.keep(0)
        order = self._agreed = AgreedOrder(self._listed, self._group)

        def attend() -> None:
            self._begin()
            self._follow(order, None)
            self._end()

        try:
            yield attend
        finally:
            self._agreed = None

    def _enter_model(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._in_forward:  # the last one was ended by what is no Exception, of which hooks are not told
            self.reset()
        if self._depth == 0 and not self._is_announced:
            self._begin_watched(args, kwargs)
        self._in_forward = True
        if self._depth == 0:
            self._begin()
            if self._agreed is None:
                self._gather_ahead(self._to_gather(self._expected))
        self._depth += 1

    def _leave_model(self, _: nn.Module, args: Any, output: Any) -> None:
        self._in_forward = False
        if self._agreed is not None and self._depth == 1 and output is not None:
            self._follow(self._agreed, None)
        self._release()
        if self._depth == 0 and not self._is_announced:
            self._end_watched(output is not None)

    def _begin_watched(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        self._has_run = not self._listed
        return all([before(args, kwargs) for before, _after in self._watchers])

    def _end_watched(self, has_result: bool) -> None:
        for _before, after in self._watchers:
            after(has_result and self._has_run)

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
            buffer = self._gathered(weights, []) if self._agreed is None else self._agreed_on(weights, self._agreed)
            self._gatherer.wait(buffer)
            weights.show(buffer)
            self._running[weights] = buffer
            if self._agreed is not None:
                self._has_run = True
                return
            self._order.append(weights)
            if self._depth:
                self._has_run = True
                self._gather_ahead(self._following(weights))

        return enter

    def _leaving(self, weights: UnitWeights) -> Callable[..., None]:
        def leave(*_: Any) -> None:
            if weights in self._running:
                weights.hide()
                self._running.pop(weights)
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
        if self._agreed is not None:
            self._agreed.begin()
        if self._rest_buffer.holds is not self._rest:
            if self._rest not in self._kept:
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
        self._order, self._there, self._turn = [], {}, 0
        passing = self._buffers if self._rest in self._kept else [self._rest_buffer, *self._buffers]
        self._gatherer.end(passing, self._kept.values())

    @property
    def _expected(self) -> list[UnitWeights]:
        return self._steady if self._is_steady and self._steady is not None else self._last

    def _following(self, weights: UnitWeights) -> list[UnitWeights]:
        """Return the units that will be entered next and are to be gathered."""
        expected, place = self._expected, len(self._order) - 1
        if place < len(expected) and expected[place] is weights:
            return self._to_gather(expected, place + 1)
        return self._to_gather(self._listed, self._listed.index(weights) + 1)

    def _to_gather(self, units: list[UnitWeights], start: int = 0) -> list[UnitWeights]:
        """Return the first units from `start` on to be gathered ahead: not those that are kept and there."""
        wanted = (one for one in islice(units, start, None) if one not in self._kept or self._own[one].holds is not one)
        return list(islice(wanted, self._ahead))

    def _gather_ahead(self, following: list[UnitWeights]) -> None:
        room = len(self._buffers) - sum(one not in self._kept for one in self._running)
        for weights in following:
            if weights not in self._kept:
                room -= 1
                if room < 0:
                    return
            self._gathered(weights, following)

    def _agreed_on(self, weights: UnitWeights, order: AgreedOrder) -> Buffer:
        """Return the buffer that has, or will have, the weights of a unit, on all ranks."""
        if self._depth == 0:
            raise RuntimeError(
                "a node calls a block of the model by itself, outside of its forward, which workers with FSDP cannot "
                "follow while groups of them do several images: use dp_degree = 1, or make one image at a time"
            )
        if len(self._running) == len(self._buffers):
            raise RuntimeError(_TOO_DEEP)
        self._follow(order, weights)
        return self._there[weights]

    def _follow(self, order: AgreedOrder, wanted: UnitWeights | None) -> None:
        """Gather what the ranks need, one after another, until it is what is `wanted` here, or no rank needs any."""
        units: list[UnitWeights] | None = None
        while units is None or (units and units[0] is not wanted):
            units = order.next(wanted, len(self._buffers) - len(self._running))
            self._there = {one: self._there[one] for one in units if one in self._there}
            for one in units:
                if one not in self._there:
                    used = (*self._there.values(), *self._running.values())
                    buffer = next(buffer for buffer in self._buffers if buffer not in used)
                    self._start(one, buffer)
                    self._there[one] = buffer

    def _gathered(self, weights: UnitWeights, needed: list[UnitWeights]) -> Buffer:
        """Return the buffer that has, or will have, the weights of a unit. Start to gather them if none does, into one
        that has none of the `needed` units, or into its own if it is kept.
        """
        if (own := self._kept.get(weights)) is not None:
            if own.holds is not weights:
                self._gatherer.start(weights, own)
            return own
        for buffer in self._buffers:
            if buffer.holds is weights:
                return buffer
        for _ in self._buffers:
            buffer = self._buffers[self._turn]
            self._turn = (self._turn + 1) % len(self._buffers)
            if buffer.holds is None or (buffer.holds not in self._running and buffer.holds not in needed):
                self._start(weights, buffer)
                return buffer
        raise RuntimeError(_TOO_DEEP)

    def _start(self, weights: UnitWeights, buffer: Buffer) -> None:
        """Start to gather a unit into a buffer whose unit is not used any more."""
        if buffer.holds is None:
            buffer.allocate(self._gatherer.device)
        self._gatherer.start(weights, buffer)
