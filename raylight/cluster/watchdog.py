"""A watchdog over the workers of one session: it finds the rank that died, stopped, or stands still, also between runs.

Each rank is asked for a report, over and over; it answers from a thread of its own while it works. Reports carry its
log, which is repeated here.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import psutil
import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError

from .actor import Place
from .config import SessionConfig
from .diagnosis import Fault, of_process, oom_kills
from .errors import HUNG, RAY_LOST
from .ray_runtime import RUNTIME
from .status import IDLE, LogLine, Report, repeat

logger = logging.getLogger(__name__)

_TICK_S = 0.5
_PATIENCE_S = 2.0  # a rank with nothing to say says so after this time
_STOPPED_S = 3.0  # a process may be stopped for a moment, by a debugger or a snapshot
_KEPT_LINES = 20


class Watchdog:
    """Watches `actors` (by rank) until `stop`. On the first fault it calls `on_fault` once, from its own thread."""

    def __init__(self, config: SessionConfig, actors: Mapping[int, Any], on_fault: Callable[[Fault], None]) -> None:
        self._config = config
        self._actors = dict(actors)
        self._on_fault = on_fault
        self._places: dict[int, Place] = {}
        self._refs: dict[Any, int] = {}
        self._reports: dict[int, Report] = {}
        self._heard: dict[int, float] = {}
        self._moved: dict[int, float] = {}
        self._stopped_since: dict[int, float] = {}
        self._run = ""
        self._lines: dict[int, deque[LogLine]] = {rank: deque(maxlen=_KEPT_LINES) for rank in actors}
        self._oom_kills = oom_kills()
        self._end = threading.Event()
        self._fault: Fault | None = None
        self._thread = threading.Thread(target=self._watch, name="raylight-watchdog", daemon=True)
        self._thread.start()
        # Before Ray's own end of a process, as it was registered later: what asked Ray after it would start another.
        atexit.register(self._end_with_process)

    @property
    def fault(self) -> Fault | None:
        """The fault that was found, if one was."""
        return self._fault

    @property
    def phases(self) -> dict[int, str]:
        """What each rank was at when it was last heard of."""
        return {rank: report.phase for rank, report in self._reports.items()}

    def know(self, places: Mapping[int, Place]) -> None:
        """From now on the ranks' processes are known."""
        self._places = dict(places)

    def begin(self, run: str) -> None:
        """From now on the ranks do this run: what they have said before is of no more use."""
        self._run = run

    def last_lines(self, rank: int) -> tuple[str, ...]:
        """The last lines that a rank has logged in the run that it does, or did last."""
        return tuple(line.text for line in list(self._lines[rank]) if line.run == self._run)

    def stop(self) -> None:
        """Watch no more. Does not wait."""
        self._end.set()
        atexit.unregister(self._end_with_process)

    def _end_with_process(self) -> None:
        self._end.set()
        self._thread.join(4 * _TICK_S)

    def _watch(self) -> None:
        for rank, actor in self._actors.items():
            self._ask(rank, actor)
        last = time.monotonic()
        while not self._end.is_set():
            try:
                fault = self._look()
            except Exception as error:  # of Ray, when it goes down: nothing else must end the watch silently
                fault = None if self._end.is_set() else Fault(RAY_LOST, None, f"Ray has failed: {error}")
            now = time.monotonic()
            if now - last > 10 * _TICK_S and (fault is None or fault.kind == HUNG):
                self._forgive(now - last)  # this process itself has stood still: nobody was heard, and nobody is late
            elif fault is not None:
                self._fault = fault
                if not self._end.is_set():
                    self._on_fault(fault)
                return
            last = now

    def _look(self) -> Fault | None:
        if (fault := self._ray_lost()) is not None:
            return fault
        if not ray.is_initialized():  # any call would start another one
            if threading.main_thread().is_alive():
                return Fault(
                    RAY_LOST,
                    None,
                    "Ray was shut down in ComfyUI's process, by another node pack for "
                    "example. Run the prompt again: Ray and the workers then start anew",
                )
            self._end.set()  # this process ends
            return None
        ready, _ = ray.wait(list(self._refs), timeout=_TICK_S)
        for ref in ready:
            rank = self._refs.pop(ref)
            try:
                self._take(rank, ray.get(ref, timeout=_TICK_S))
            except (RayActorError, OutOfMemoryError) as error:
                time.sleep(_TICK_S)  # ranks die with Ray, and may be the first to be missed
                return self._ray_lost() or of_process(rank, error, oom_kills() > self._oom_kills)
            except RayError as error:
                return Fault(RAY_LOST, rank, f"Ray has failed: {error}")
            self._ask(rank, self._actors[rank])
        return self._stopped() or self._silent() or self._standing()

    def _ray_lost(self) -> Fault | None:
        lost = RUNTIME.lost() if self._config.is_local else None
        if lost is None:
            return None
        return Fault(
            RAY_LOST,
            None,
            f"Ray's process {lost} has ended, which the workers need: it was killed, or "
            f"crashed. Run the prompt again: Ray and the workers then start anew",
        )

    def _ask(self, rank: int, actor: Any) -> None:
        self._refs[actor.report.remote(_PATIENCE_S)] = rank

    def _take(self, rank: int, report: Report) -> None:
        now = time.monotonic()
        before = self._reports.get(rank)
        self._reports[rank], self._heard[rank] = report, now
        if before is None or (before.beats, before.phase) != (report.beats, report.phase) or report.phase == IDLE:
            self._moved[rank] = now
        for line in report.lines:
            self._lines[rank].append(line)
            repeat(line, rank)

    def _stopped(self) -> Fault | None:
        """A rank of this machine whose process is stopped, as by SIGSTOP."""
        for rank, place in self._places.items() if self._config.is_local else ():
            try:
                stopped = psutil.Process(place.pid).status() == psutil.STATUS_STOPPED
            except psutil.Error:
                continue  # it has ended, which its report will tell
            since = self._stopped_since.setdefault(rank, time.monotonic()) if stopped else None
            if since is None:
                self._stopped_since.pop(rank, None)
            elif time.monotonic() - since > _STOPPED_S:
                return Fault(HUNG, rank, "its process was stopped (by SIGSTOP, or a debugger) and did not go on")
        return None

    def _silent(self) -> Fault | None:
        limit = self._config.heartbeat_timeout_s
        for rank, heard in self._heard.items():
            if time.monotonic() - heard > limit:
                return Fault(HUNG, rank, f"its process has not answered for {limit:g} s")
        return None

    def _standing(self) -> Fault | None:
        """Of ranks that all work and stand still, the one that came least far: the others wait for it."""
        limit, now = self._config.stall_timeout_s, time.monotonic()
        if len(self._moved) < len(self._actors) or any(now - moved <= limit for moved in self._moved.values()):
            return None
        rank = min(self._reports, key=lambda rank: self._reports[rank].beats)
        return Fault(HUNG, rank, f"it has not got on for {limit:g} s, and the others wait for it")

    def _forgive(self, gap_s: float) -> None:
        for times in (self._heard, self._moved, self._stopped_since):
            for rank in times:
                times[rank] += gap_s
