"""The actor of one rank. Its methods are all that a session calls across processes.

Ray imports this module by its plain name in the worker. Work is done by one thread; cancel, the event stream and
reports run beside it.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
import torch

from raylight.parallel import bandwidth, heartbeat
from raylight.parallel.mesh import MeshShape, build_mesh
from raylight.parallel.process_group import Rendezvous, any_rank, host_store, join_world

from . import ray_environment, status
from .config import ServiceSpec
from .errors import NCCL_BYTES, OutOfMemory, RunCancelled, is_out_of_memory, may_be_of_memory
from .status import IDLE, Report, Status

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank runs. `gpu` is the index of its GPU on that machine, None without one."""

    rank: int
    host: str
    pid: int
    device: str
    gpu: int | None = None

    def __str__(self) -> str:
        device = self.device if self.gpu is None else f"{self.device}, GPU {self.gpu}"
        return f"rank {self.rank} ({device}, pid {self.pid} on {self.host})"


@dataclass(frozen=True, slots=True)
class Cancelled:
    """What a run returns when it was cancelled."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a rank has come in its last run: the collectives that each of its groups has begun, and the beats of its
    pulse, which NCCL's sends are among."""

    begun: heartbeat.Tally | None
    beats: int


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
    _status: Status
    _events: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    _cancel: threading.Event = field(default_factory=threading.Event)

    def enter(self, phase: str) -> None:
        """Say what this rank begins now, for people to read where it fails; it must read well behind "while"."""
        self._status.enter(phase)

    def emit(self, event: Any) -> None:
        """Send an event to the driver, which listens to rank 0."""
        if self.rank == 0:
            self._events.put(event)

    def check_cancelled(self) -> None:
        """Raise RunCancelled on all ranks if one was asked to cancel. Collective: called at the same steps by all."""
        if any_rank(self._cancel.is_set()):
            raise RunCancelled


_END = object()
_SWEEP_S = 10.0


class RankActor:
    """Rank `rank` of a world, in a process of its own."""

    def __init__(self, rank: int, world_size: int, device_type: str, log_level: int) -> None:
        # Only arguments are kept here: the GPU and the peers are known later, in `join`.
        self._rank = rank
        self._status = Status()
        faulthandler.enable(sys.__stderr__)  # a crash leaves its stack in the file of this worker's output
        status.forward(self._status, rank, log_level)
        self._world_size = world_size
        self._device = torch.device(device_type, 0) if device_type == "cuda" else torch.device(device_type)
        self._runs: dict[str, Run] = {}
        self._lock = threading.Lock()
        self._store: Any = None
        self._service: Any = None
        self._swept_at = time.monotonic()
        self._beats_before = 0

    def place(self) -> Place:
        """Where this rank is. Raises RuntimeError when it should have a GPU and sees none."""
        device, gpu = self._device.type, None
        if device == "cuda":
            if not torch.cuda.is_available():
                raise RuntimeError(f"the worker of rank {self._rank} sees no GPU")
            device = torch.cuda.get_device_name(0)
            gpu = ray_environment.machine_gpu_index(os.environ, torch.version.hip is not None)
        return Place(self._rank, ray.util.get_node_ip_address(), os.getpid(), device, gpu)

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
        with self._memory_told():
            join_world(rendezvous, self._rank, self._device, self._store)
            context = RankContext(self._rank, self._world_size, self._device, build_mesh(mesh, self._device))
            with status.briefly():
                self._service = service.open(context)
        self._status.enter(IDLE)

    def try_links(self) -> bandwidth.Links:
        """What the ways between the ranks do. Collective."""
        self._status.enter("trying the ways between the workers")
        with self._memory_told():
            measured = bandwidth.measure(self._device)
        self._status.enter(IDLE)
        return measured

    def run(self, run_id: str, verb: str, *args: Any) -> Any:
        """Call the service's `verb(run, *args)`. Return its result, or `Cancelled`.

        Raises what it raises; OutOfMemory, with what the service holds, where memory was exhausted. This rank goes on
        after it if all have met it alike, see `settle`; else it ends.
        """
        run = self._run(run_id)
        self._status.run = run_id
        self._beats_before = heartbeat.beats()
        run.enter(f"beginning to {verb}")
        try:
            with self._memory_told(), heartbeat.cancellation_checked_by(run.check_cancelled):
                result = getattr(self._service, verb)(run, *args)
            run.enter(IDLE)
            return result
        except RunCancelled:
            logger.info("cancelled")
            run.enter(IDLE)
            return Cancelled()
        finally:
            run._events.put(_END)
            if self._rank != 0:
                self._forget(run_id)

    def stand(self) -> Standing:
        """How far this rank has come in the run that it has ended."""
        return Standing(heartbeat.begun(), heartbeat.beats() - self._beats_before)

    def settle(self) -> bool:
        """Get ready for the next run after one that has failed; False where that cannot be. Collective: for ranks that
        stand at the same place, so that what they have begun together ends by itself."""
        recovers = self._service.recover()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # raises what has gone wrong on the GPU for good
        any_rank(False)
        gc.collect()  # what the failed run had, and refers to itself
        self._status.enter(IDLE)
        return recovers

    @contextmanager
    def _memory_told(self) -> Iterator[None]:
        """Within it, what was raised because memory is exhausted becomes OutOfMemory, with what the service holds."""
        try:
            yield
        except Exception as error:
            if not (is_out_of_memory(error) or (may_be_of_memory(error) and self._is_full())):
                raise
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            held = "nothing yet" if self._service is None else self._service.inventory()
            raise OutOfMemory(f"{first.rstrip('.')}. It held {held}") from error

    def _is_full(self) -> bool:
        """Whether this rank's GPU has no room for what NCCL takes. False where CUDA does not answer any more."""
        try:
            return self._device.type == "cuda" and torch.cuda.mem_get_info(self._device)[0] < NCCL_BYTES
        except RuntimeError:
            return False

    @ray.method(concurrency_group="control", num_returns="streaming")
    def events(self, run_id: str) -> Iterator[Any]:
        """The events of a run, as they come, until it ends. Rank 0 only, where every run has one listener."""
        events = self._run(run_id)._events
        while (event := events.get()) is not _END:
            yield event
        self._forget(run_id)

    @ray.method(concurrency_group="watch")
    def report(self, patience_s: float) -> Report:
        """What is new on this rank, see `Status.report`."""
        report = self._status.report(patience_s)
        if report.phase == IDLE and time.monotonic() - self._swept_at > _SWEEP_S:
            # As ComfyUI does after prompts: what refers to itself keeps its tensors until it is looked for.
            gc.collect()
            self._swept_at = time.monotonic()
        return report

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
            return self._runs.setdefault(run_id, Run(self._rank, self._status))
