"""The watchdog of one session: finds ranks that died, were stopped, or make no progress, also between runs.

It asks each rank for reports, one after the other; a thread beside the rank's work answers. Reports carry the rank's
log, which is repeated here.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil
import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError

from . import machines
from .config import SessionConfig
from .diagnosis import Failure, dead_process, oom_kills
from .errors import HUNG, MACHINE_LOST, RAY_LOST
from .machine_watch import LOST_S, MachineWatch
from .place import Place
from .ray_runtime import RUNTIME
from .status import IDLE, LogLine, Report, repeat
from .timeouts import with_timeout

logger = logging.getLogger(__name__)

_TICK_S = 0.5
_PATIENCE_S = 2.0  # after this time a rank reports even if nothing is new
_STOPPED_S = 3.0  # a debugger or a snapshot may stop a process for a moment
_KEPT_LINES = 20


class Watchdog:
    """Watches actors from `start` to `stop`. On the first failure it calls `on_failure` once, from its own thread.

    `failure` is the one that was found, if any.
    """

    def __init__(self, config: SessionConfig, on_failure: Callable[[Failure], None]) -> None:
        self.failure: Failure | None = None
        self.config = config
        self._on_failure = on_failure
        self._actors: Sequence[Any] = ()
        self._places: dict[int, Place] = {}
        self._machines: MachineWatch | None = None
        self._refs: dict[Any, int] = {}
        self._reports: dict[int, Report] = {}
        self._reported_at: dict[int, float] = {}
        self._progress_at: dict[int, float] = {}
        self._stopped_since: dict[int, float] = {}
        self._run = ""
        self._lines: dict[int, deque[LogLine]] = {}
        self._oom_kills = oom_kills()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="raylight-watchdog", daemon=True)

    def start(self, actors: Sequence[Any]) -> None:
        """Start watching the actors of all ranks."""
        self._actors = tuple(actors)
        self._thread.start()
        # Runs before Ray's own exit handler, as it is registered later: a call after that would start another Ray.
        atexit.register(self._stop_at_exit)

    @property
    def phases(self) -> dict[int, str]:
        """The last reported phase of each rank."""
        return {rank: report.phase for rank, report in self._reports.items()}

    def set_places(self, places: Mapping[int, Place]) -> None:
        """Set where the ranks run, so that their processes can be watched.

        Raises TimeoutError: when a cluster does not answer.
        """
        self._places = dict(places)
        if not self.config.is_local and not self._end.is_set():
            used = {place.node for place in places.values()}
            found = with_timeout(machines.known, machines.LIST_S, machines.LIST)
            self._machines = MachineWatch(machine for machine in found if machine.node in used)

    def begin(self, run: str) -> None:
        """Set the id of the ranks' run: what they have logged before does not matter any more."""
        self._run = run

    def last_lines(self, rank: int) -> tuple[str, ...]:
        """Return the last lines that a rank has logged in its current or last run."""
        return tuple(line.text for line in list(self._lines.get(rank, ())) if line.run == self._run)

    def stop(self) -> None:
        """Stop watching. Does not wait for the thread."""
        self._end.set()
        if self._machines is not None:
            self._machines.stop()
        atexit.unregister(self._stop_at_exit)

    def _stop_at_exit(self) -> None:
        self._end.set()
        self._thread.join(4 * _TICK_S)

    def _watch(self) -> None:
        for rank in range(len(self._actors)):
            self._ask(rank)
        last = time.monotonic()
        while not self._end.is_set():
            try:
                failure = self._check()
            except Exception as error:  # of Ray, when it goes down; it must not end the watch silently
                failure = None if self._end.is_set() else Failure(RAY_LOST, None, f"Ray has failed: {error}")
            now = time.monotonic()
            if now - last > 10 * _TICK_S and (failure is None or failure.kind == HUNG):
                self._postpone(now - last)  # this process itself was stopped, and received no reports
            elif failure is not None:
                self.failure = failure
                if not self._end.is_set():
                    self._on_failure(failure)
                return
            last = now

    def _check(self) -> Failure | None:
        if (failure := self._ray_lost() or self._machine_lost()) is not None:
            return failure
        if not ray.is_initialized():  # any call would start another Ray
            if threading.main_thread().is_alive():
                cause = "Ray was shut down in ComfyUI's process, for example by another node pack"
                return Failure(RAY_LOST, None, cause)
            self._end.set()  # this process exits
            return None
        ready, _ = ray.wait(list(self._refs), timeout=_TICK_S)
        for ref in ready:
            rank = self._refs.pop(ref)
            try:
                self._receive(rank, ray.get(ref, timeout=_TICK_S))
            except (RayActorError, OutOfMemoryError) as error:
                time.sleep(_TICK_S)  # ranks die with Ray, and may be noticed first
                lost = self._ray_lost() or self._machine_lost(rank)
                return lost or dead_process(rank, error, oom_kills() > self._oom_kills)
            except RayError as error:
                return self._machine_lost(rank) or Failure(RAY_LOST, rank, f"Ray has failed: {error}")
            self._ask(rank)
        return self._stopped() or self._silent() or self._stalled()

    def _ray_lost(self) -> Failure | None:
        lost = RUNTIME.lost() if self.config.is_local else None
        if lost is None:
            return None
        return Failure(RAY_LOST, None, f"Ray's process {lost} has ended, without which workers cannot run")

    @property
    def patience_s(self) -> float:
        """How long it may take to find out that another machine is why a rank has met an error."""
        return 0.0 if self._machines is None else 1.5 * LOST_S

    def _machine_lost(self, suspect: int | None = None) -> Failure | None:
        """Find a machine that does not answer. The machine of the rank `suspect` is asked at once."""
        if self._machines is None:
            return None
        place = None if suspect is None else self._places.get(suspect)
        machine = self._machines.lost(None if place is None else place.node)
        if machine is None:
            return None
        ranks = [rank for rank, place in self._places.items() if place.node == machine.node]
        return Failure(
            MACHINE_LOST,
            None,
            f"the machine {machine} does not answer any more, where {_names(ranks)} ran: it is off, its Ray has ended, "
            f"or the network between it and ComfyUI is interrupted",
        )

    def _ask(self, rank: int) -> None:
        self._refs[self._actors[rank].report.remote(_PATIENCE_S)] = rank

    def _receive(self, rank: int, report: Report) -> None:
        now = time.monotonic()
        before = self._reports.get(rank)
        self._reports[rank], self._reported_at[rank] = report, now
        if before is None or (before.progress, before.phase) != (report.progress, report.phase) or report.phase == IDLE:
            self._progress_at[rank] = now
        self._lines.setdefault(rank, deque(maxlen=_KEPT_LINES)).extend(report.lines)
        for line in report.lines:
            repeat(line, rank)

    def _stopped(self) -> Failure | None:
        """Find a rank of this machine whose process is stopped, as by SIGSTOP."""
        for rank, place in self._places.items() if self.config.is_local else ():
            try:
                stopped = psutil.Process(place.pid).status() == psutil.STATUS_STOPPED
            except psutil.Error:
                continue  # it has ended, which its report will show
            if not stopped:
                self._stopped_since.pop(rank, None)
            elif time.monotonic() - self._stopped_since.setdefault(rank, time.monotonic()) > _STOPPED_S:
                return Failure(HUNG, rank, "its process was stopped (by SIGSTOP or a debugger)")
        return None

    def _silent(self) -> Failure | None:
        """Find a rank that sends no reports."""
        limit_s = self.config.heartbeat_timeout_s
        for rank, reported_at in self._reported_at.items():
            if time.monotonic() - reported_at > limit_s:
                return Failure(HUNG, rank, f"its process has not answered for {limit_s:g} s")
        return None

    def _stalled(self) -> Failure | None:
        """If no rank makes progress, find the one with the fewest heartbeats: the others are waiting for it."""
        limit_s, now = self.config.stall_timeout_s, time.monotonic()
        if len(self._progress_at) < len(self._actors) or any(now - at <= limit_s for at in self._progress_at.values()):
            return None
        rank = min(self._reports, key=lambda rank: self._reports[rank].beats)
        waiting = "; the other ranks are waiting for it" if len(self._actors) > 1 else ""
        return Failure(HUNG, rank, f"no progress for {limit_s:g} s{waiting}")

    def _postpone(self, gap_s: float) -> None:
        for times in (self._reported_at, self._progress_at, self._stopped_since):
            for rank in times:
                times[rank] += gap_s


def _names(ranks: Sequence[int]) -> str:
    return f"rank{'' if len(ranks) == 1 else 's'} {' and '.join(map(str, ranks))}"
