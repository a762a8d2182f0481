"""The actor of one rank: all methods that a session calls across processes.

Ray imports this module by its plain name in the worker. One thread does the work; cancel, the event stream and reports
have threads beside it.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import platform
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import ray
import torch

from raylight.parallel import bandwidth, heartbeat, memory_shares, shares, speed_trial
from raylight.parallel.degrees import Arrangement, DegreesByRun
from raylight.parallel.mesh import Meshes
from raylight.parallel.process_group import Rendezvous, any_rank, host_store, join_world

from . import network, ray_environment, status
from .config import ServiceSpec
from .errors import NCCL_BYTES, OutOfMemory, RunCancelled, is_out_of_memory, may_be_out_of_memory
from .place import Place
from .quick_imports import quick_imports
from .run import Cancelled, RankContext, Run
from .status import IDLE, Report, Status
from .timeline import WORKER

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Progress:
    """A rank's progress in its last run: the collectives that each of its groups has begun, and its heartbeats.

    Heartbeats include NCCL's sends, which are not counted as collectives.
    """

    begun: heartbeat.Tally | None
    beats: int


_COLLECT_S = 10.0


class RankActor:
    """One rank, in a process of its own.

    To start it, the session calls `prepare`, and beside it `place`, `open_store` on rank 0, `join` and
    `measure_links`; then `try_speed` and `open`.
    """

    def __init__(
        self, rank: int, world_size: int, device_type: str, log_level: int, environment: Mapping[str, str]
    ) -> None:
        """`environment` are variables of this rank alone, which choose its GPU."""
        os.environ.update(environment)
        WORKER.mark("process", psutil.Process().create_time())
        WORKER.mark("actor")
        self._rank = rank
        self._status = Status()
        faulthandler.enable(2)  # a crash leaves its stack in the file of this worker's output
        status.report_logs(self._status, rank, log_level)
        self._world_size = world_size
        self._device = torch.device(device_type, 0) if device_type == "cuda" else torch.device(device_type)
        self._gpu: int | None = None
        if device_type == "cuda":
            self._gpu = ray_environment.machine_gpu_index(os.environ, torch.version.hip is not None)
            torch.cuda.is_available()  # CUDA reads once which GPUs there are
        else:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
        self._runs: dict[str, Run] = {}
        self._lock = threading.Lock()
        self._store: Any = None
        self._service: Any = None  # a Service
        self._meshes: Meshes | None = None
        self._context: RankContext | None = None
        self._collected_at = time.monotonic()
        self._beats_before = 0

    def prepare(self, service: ServiceSpec) -> None:
        """Do what the service needs before it can be opened."""
        with self._explain_out_of_memory(), status.brief_logs(), quick_imports():
            service.prepare(self._device.type)
        WORKER.mark("prepared")

    @ray.method(concurrency_group="control")
    def place(self) -> Place:
        """Return where this rank runs. Raises RuntimeError: when it needs a GPU and sees none."""
        device, memory_bytes = self._device.type, 0
        if device == "cuda":
            if not torch.cuda.is_available():
                raise RuntimeError(f"the worker of rank {self._rank} sees no GPU")
            device = torch.cuda.get_device_name(0)
            memory_bytes = torch.cuda.get_device_properties(0).total_memory
            WORKER.mark("CUDA")
        node = ray.get_runtime_context().get_node_id()
        host = ray.util.get_node_ip_address()
        return Place(self._rank, host, os.getpid(), device, self._gpu, platform.node(), node, memory_bytes)

    @ray.method(concurrency_group="control")
    def open_store(self, host: str, timeout_s: float) -> Rendezvous:
        """Open the store at which the ranks meet. For rank 0."""
        self._store, rendezvous = host_store(host, self._world_size, timeout_s)
        return rendezvous

    @ray.method(concurrency_group="control")
    def join(self, rendezvous: Rendezvous) -> None:
        """Join the process group. Collective."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            WORKER.mark("CUDA context")
        network.use_route_to(rendezvous.host)
        with self._explain_out_of_memory():
            join_world(rendezvous, self._rank, self._device, self._store)
        WORKER.mark("met")

    @ray.method(concurrency_group="control")
    def measure_links(self) -> bandwidth.Links:
        """Measure the links between the ranks. Collective: no other collective may run beside it."""
        before = self._status.phase
        self._status.enter("measuring the links between the workers")
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # of this thread
        with self._explain_out_of_memory():
            measured = bandwidth.measure(self._device)
        WORKER.mark("links measured" if "links tried" in WORKER.moments else "links tried")
        self._status.enter(before)
        return measured

    @ray.method(concurrency_group="control")
    def try_speed(self) -> speed_trial.Trial:
        """Try how fast the ranks are. Collective: no other collective may run beside it."""
        before = self._status.phase
        self._status.enter("trying how fast the workers are")
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # of this thread
        with self._explain_out_of_memory():
            trial = speed_trial.measure(self._device)
        self._status.enter(before)
        return trial

    def open(self, arrangement: Arrangement, service: ServiceSpec, links: bandwidth.Links | None) -> dict[str, float]:
        """Open the service, and return the moments of this worker's start. Collective."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        with self._explain_out_of_memory(), status.brief_logs(), quick_imports():
            self._meshes = Meshes(self._device)
            self._context = RankContext(self._rank, self._world_size, self._device, None, links)
            self._arrange(arrangement)
            self._service = service.open(self._context)
        self._status.enter(IDLE)
        WORKER.mark("open")
        return WORKER.moments

    def reshape(self, arrangement: Arrangement) -> None:
        """Have the following runs use another arrangement of the same ranks. Collective."""
        self._status.enter("arranging the workers in another mesh")
        with self._explain_out_of_memory():
            self._arrange(arrangement)
        self._status.enter(IDLE)

    def _arrange(self, arrangement: Arrangement) -> None:
        assert self._meshes is not None and self._context is not None, "the service is open"
        # Models use it also where forwards choose other meshes.
        self._context.mesh = self._meshes.of(arrangement.mesh, keep=True)
        shares.use(arrangement.speeds)
        memory_shares.use(arrangement.memory)
        self._context.by_run = DegreesByRun(arrangement, self._meshes) if arrangement.by_run else None

    def run(self, run_id: str, verb: str, *args: Any) -> Any:
        """Call the service's `verb(run, *args)`. Return its result, or `Cancelled`.

        Raises OutOfMemory: when memory ran out. Raises what the verb raises. After an error that is common to all
        ranks the session calls `recover`; after any other it ends this worker.
        """
        run = self._run(run_id)
        self._status.run = run_id
        self._beats_before = heartbeat.beats()
        run.enter(f"beginning to {verb}")
        try:
            with self._explain_out_of_memory(), heartbeat.cancellation_checked_by(run.check_cancelled):
                result = getattr(self._service, verb)(run, *args)
            run.enter(IDLE)
            return result
        except RunCancelled:
            logger.info("cancelled")
            run.enter(IDLE)
            return Cancelled()
        finally:
            run.end()
            if self._rank != 0:
                self._forget(run_id)

    def progress(self) -> Progress:
        """Return how far this rank got in its last run."""
        return Progress(heartbeat.begun(), heartbeat.beats() - self._beats_before)

    def recover(self) -> bool:
        """Get ready for the next run after a failed one. Return False if that is impossible.

        Collective. All ranks must have the same `progress`, so that the collectives that they have begun end.
        """
        recovers = self._service.recover()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # raises an error that has broken the CUDA context
        any_rank(False)
        gc.collect()  # tensors of the failed run in reference cycles
        self._status.enter(IDLE)
        return recovers

    @contextmanager
    def _explain_out_of_memory(self) -> Iterator[None]:
        """Turn errors that mean that memory ran out into OutOfMemory, with what the service holds."""
        try:
            yield
        except Exception as error:
            if not (is_out_of_memory(error) or (may_be_out_of_memory(error) and self._is_full())):
                raise
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            held = "nothing yet" if self._service is None else self._service.inventory()
            spare_bytes = 0 if self._service is None else self._service.spare_bytes()
            raise OutOfMemory(f"{first.rstrip('.')}. It held {held}", spare_bytes) from error

    def _is_full(self) -> bool:
        """Return whether this rank's GPU has no room for NCCL. False if CUDA does not answer any more."""
        try:
            return self._device.type == "cuda" and torch.cuda.mem_get_info(self._device)[0] < NCCL_BYTES
        except RuntimeError:
            return False

    @ray.method(concurrency_group="control", num_returns="streaming")
    def events(self, run_id: str) -> Iterator[Any]:
        """Return the events of a run, as they come, until it ends. For rank 0, where every run has one listener."""
        yield from self._run(run_id).events()
        self._forget(run_id)

    @ray.method(concurrency_group="watch")
    def report(self, patience_s: float) -> Report:
        """Return what is new on this rank, as `Status.report`."""
        report = self._status.report(patience_s)
        if report.phase == IDLE and time.monotonic() - self._collected_at > _COLLECT_S:
            # As ComfyUI does after prompts: reference cycles keep their tensors until then.
            gc.collect()
            self._collected_at = time.monotonic()
        return report

    @ray.method(concurrency_group="control")
    def cancel(self, run_id: str) -> None:
        """Cancel a run at its next cancellation point. Does nothing if it has ended."""
        with self._lock:
            run = self._runs.get(run_id)
        if run is not None:
            run.cancel()

    def _forget(self, run_id: str) -> None:
        with self._lock:
            self._runs.pop(run_id, None)

    def _run(self, run_id: str) -> Run:
        with self._lock:
            return self._runs.setdefault(run_id, Run(self._rank, self._status))
