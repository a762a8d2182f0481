"""The actor of one rank. Its methods are all that a session calls across processes.

Ray imports this module by its plain name in the worker. Work is done by one thread; cancel and the
event stream run beside it.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
import torch

from raylight.parallel.mesh import build_mesh
from raylight.parallel.process_group import Rendezvous, any_rank, host_store, join_world
from raylight.parallel.shape import MeshShape

from .config import ServiceSpec
from .errors import RunCancelled

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank runs."""

    rank: int
    host: str
    pid: int
    device: str

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.device}, pid {self.pid} on {self.host})"


@dataclass(frozen=True, slots=True)
class Cancelled:
    """What a run returns when it was cancelled."""


@dataclass(slots=True)
class RankContext:
    """What a service knows of its rank."""

    rank: int
    world_size: int
    device: torch.device
    mesh: Any


@dataclass(slots=True)
class Run:
    """One call that streams events and can be cancelled."""

    rank: int
    _events: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    _cancel: threading.Event = field(default_factory=threading.Event)

    def emit(self, event: Any) -> None:
        """Send an event to the driver, which listens to rank 0."""
        if self.rank == 0:
            self._events.put(event)

    def check_cancelled(self) -> None:
        """Raise RunCancelled on all ranks if one was asked to cancel. Collective: called at the same steps by all."""
        if any_rank(self._cancel.is_set()):
            raise RunCancelled


_END = object()


class RankActor:
    """Rank `rank` of a world, in a process of its own."""

    def __init__(self, rank: int, world_size: int, device_type: str) -> None:
        # Only arguments are kept here: the GPU and the peers are known later, in `join`.
        self._rank = rank
        self._world_size = world_size
        self._device = torch.device(device_type, 0) if device_type == "cuda" else torch.device(device_type)
        self._runs: dict[str, Run] = {}
        self._lock = threading.Lock()
        self._store: Any = None
        self._service: Any = None

    def place(self) -> Place:
        """Where this rank is. Raises RuntimeError when it should have a GPU and sees none."""
        device = self._device.type
        if device == "cuda":
            if not torch.cuda.is_available():
                raise RuntimeError(f"the worker of rank {self._rank} sees no GPU")
            device = torch.cuda.get_device_name(0)
        return Place(self._rank, ray.util.get_node_ip_address(), os.getpid(), device)

    def open_store(self, host: str, timeout_s: float) -> Rendezvous:
        """Rank 0 only: open the store at which the ranks meet."""
        self._store, rendezvous = host_store(host, self._world_size, timeout_s)
        return rendezvous

    def join(self, rendezvous: Rendezvous, mesh: MeshShape, service: ServiceSpec) -> None:
        """Join the world and start the service. Collective."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        else:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // self._world_size))
        join_world(rendezvous, self._rank, self._device, self._store)
        context = RankContext(self._rank, self._world_size, self._device, build_mesh(mesh, self._device))
        self._service = service.factory(context, service.settings)

    def run(self, run_id: str, method: str, *args: Any) -> Any:
        """Call `method(run, *args)` of the service; returns its result, or `Cancelled`."""
        run = self._run(run_id)
        try:
            return getattr(self._service, method)(run, *args)
        except RunCancelled:
            logger.info("rank %d: cancelled", self._rank)
            return Cancelled()
        finally:
            run._events.put(_END)
            if self._rank != 0:
                self._forget(run_id)

    @ray.method(concurrency_group="control", num_returns="streaming")
    def events(self, run_id: str) -> Iterator[Any]:
        """The events of a run, as they come, until it ends. Rank 0 only, where every run has one listener."""
        events = self._run(run_id)._events
        while (event := events.get()) is not _END:
            yield event
        self._forget(run_id)

    @ray.method(concurrency_group="control")
    def cancel(self, run_id: str) -> None:
        """Ask for the end of a run; it ends at the next step boundary. Does nothing to a run that has ended."""
        with self._lock:
            run = self._runs.get(run_id)
        if run is not None:
            run._cancel.set()

    def _forget(self, run_id: str) -> None:
        with self._lock:
            self._runs.pop(run_id, None)

    def _run(self, run_id: str) -> Run:
        with self._lock:
            return self._runs.setdefault(run_id, Run(self._rank))
