"""What a service is given on a rank: where it is opened, and each call of one of its verbs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from raylight.parallel.bandwidth import Links
from raylight.parallel.degrees import DegreesByRun
from raylight.parallel.process_group import any_rank_and_smallest

from .errors import RunCancelled
from .status import Status

_END = object()


@dataclass(slots=True)
class RankContext:
    """The rank, device and mesh that a service is opened for, and the links between ranks if they were measured.

    `by_run` chooses other meshes for its forwards, None if all use this one. Both are others after a `reshape`.
    """

    rank: int
    world_size: int
    device: torch.device
    mesh: Any
    links: Links | None = None
    by_run: DegreesByRun | None = None


@dataclass(slots=True)
class Run:
    """One call of a verb, which can emit events and be cancelled."""

    rank: int
    _status: Status
    _events: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    _cancel: threading.Event = field(default_factory=threading.Event)

    def enter(self, phase: str) -> None:
        """Set this rank's phase, for reports and errors. It must read well after "while"."""
        self._status.enter(phase)

    def emit(self, event: Any) -> None:
        """Send an event to the driver. Only those of rank 0 are sent."""
        if self.rank == 0:
            self._events.put(event)

    def end(self) -> None:
        """Send no more events."""
        self._events.put(_END)

    def events(self) -> Iterator[Any]:
        """Give the events of rank 0 as they come, until the end. For one listener."""
        while (event := self._events.get()) is not _END:
            yield event

    def cancel(self) -> None:
        """Ask this rank to cancel, at its next cancellation point."""
        self._cancel.set()

    @property
    def cancel_requested(self) -> bool:
        """Whether this rank was asked to cancel. Others may not have been yet."""
        return self._cancel.is_set()

    def check_cancelled(self, value: int = 0) -> int:
        """Return the smallest `value` of all ranks. Collective.

        Raises RunCancelled: on all ranks, if one was asked to cancel.
        """
        is_cancelled, agreed = any_rank_and_smallest(self._cancel.is_set(), value)
        if is_cancelled:
            raise RunCancelled
        return agreed


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The result of a run that was cancelled."""
