"""A session: the workers of one configuration, from their start to their end."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import ray

from raylight.parallel.bandwidth import Links
from raylight.parallel.degrees import Arrangement
from raylight.parallel.heartbeat import agree

from . import bandwidth_check, memory_check, placement, speed_check, unlike_workers
from .collect import POLL_S, Outcome, WaitOptions, common_error, results_or_raise, wait_for_all
from .config import ServiceSpec, SessionConfig
from .diagnosis import Failure, Remedies, WorkerStates, no_remedies, to_error, worker_error
from .errors import OUT_OF_MEMORY, RAY_LOST, RunCancelled, WorkerError, raise_cancelled
from .object_store import ObjectCache, put
from .place import Place
from .ray_runtime import RUNTIME, kill_workers
from .status import IDLE, STARTING
from .timeline import StartTimes, Timeline
from .timeouts import with_timeout
from .watchdog import Watchdog
from .worker_output import crash_in, last_lines_of, output_sizes, printed_since

logger = logging.getLogger(__name__)
R = TypeVar("R")

# What stays in the object store, which is system memory or, when that is full, a disk: patches of weights are as large
# as their LoRAs. Two models in turns find theirs there again.
_SHARED_OBJECTS, _SHARED_BYTES = 8, 4 * 2**30
_END_S = 10.0
_PROGRESS_S, _RECOVER_S = 5.0, 10.0


class Session:
    """The workers of one configuration. Use `raylight.cluster.active_session.session` to keep one between prompts."""

    def __init__(
        self,
        config: SessionConfig,
        service: ServiceSpec,
        wants_cancel: Callable[[], bool] = lambda: False,
        remedies: Remedies = no_remedies,
        on_ready: Callable[[int, int], None] = lambda *_: None,
        on_failure: Callable[[Session], None] = lambda _: None,
    ) -> None:
        """Start the workers. If that fails, no worker is left.

        `remedies` are added to failures. `on_ready` gets the number of workers that are ready, and of all, and
        `on_failure` this session when a failure has ended it. Raises ConnectionError, RuntimeError, TimeoutError,
        WorkerError or RunCancelled.
        """
        self.config, self.service, self.remedies = config, service, remedies
        self.asked = config  # with what it leaves to the cluster
        self.places: dict[int, Place] = {}
        self.shared = ObjectCache(_SHARED_OBJECTS, _SHARED_BYTES)
        self.has_worked = False  # some run has ended well
        self._after_failure = on_failure
        self._actors: list[Any] = []
        self._group: Any = None
        self._watchdog = Watchdog(config, self._on_failure)
        self._printed: dict[int, dict[str, int]] = {}
        self._arranged: Arrangement | None = None
        self.times: StartTimes | None = None  # when it is ready
        self._timeline = Timeline()
        self._ready, self._closed = False, False
        self._running, self._closing = threading.Lock(), threading.Lock()
        self._runner: int | None = None  # the thread that calls a verb
        options = WaitOptions(
            self._watchdog, wants_cancel=wants_cancel, cancel=raise_cancelled, timeout_s=config.start_timeout_s
        )
        environment = placement.environment(config, service)
        try:
            RUNTIME.connect(config, environment, wants_cancel, (service.forked_imports, service.tried_imports))
            self._timeline.mark("Ray")
            config = self.config = self._watchdog.config = placement.decided(config)
            self._group = placement.reserve(config, wants_cancel)
            of_actors = {} if RUNTIME.provides(environment) else environment
            for actor in placement.start_actors(config, self._group, of_actors):
                self._actors.append(actor)  # one by one: if another does not start, these are ended
            self._watchdog.start(self._actors)
            self._open_services(options, on_ready)
        except BaseException:
            self.close()
            raise
        self._ready = True
        self.times = StartTimes.of(self._timeline, RUNTIME.forks(place.pid for place in self.places.values()))
        places = "; ".join(map(str, self.places.values()))
        logger.info("%d workers ready in %.1f s: %s. %s", config.world_size, self.times.total_s, places, self.times)

    def _open_services(self, options: WaitOptions, on_ready: Callable[[int, int], None]) -> None:
        """Have the ranks prepare for the service, and meanwhile meet and try their links; then open it on each."""
        prepared = {rank: actor.prepare.remote(self.service) for rank, actor in enumerate(self._actors)}
        self._find_places(options)
        self._join_world(options)
        self._check_links(options, keep=False)
        of_all = self.config.world_size
        self._results(prepared, replace(options, on_result=lambda ready: on_ready(ready, of_all)))
        self._timeline.mark("prepared")
        self._check_links(options)
        self._try_speed(options)
        arrangement = self._arranged = self.arrangement
        opened = self._on_each(lambda actor: actor.open.remote(arrangement, self.service, self.links), options)
        for line in unlike_workers.describe(self.places, arrangement):
            logger.info("%s", line)
        self._timeline.ranks = list(opened.values())

    def _find_places(self, options: WaitOptions) -> None:
        """Wait until the workers' processes run, and note where."""
        self.places = dict(sorted(self._on_each(lambda actor: actor.place.remote(), options).items()))
        self._watchdog.set_places(self.places)
        self._timeline.mark("processes")

    def _join_world(self, options: WaitOptions) -> None:
        """Have the ranks form a process group."""
        host, timeout_s = self.places[0].host, self.config.collective_timeout_s
        store = self._on_each(lambda actor: actor.open_store.remote(host, timeout_s), options, self._actors[:1])[0]
        self._on_each(lambda actor: actor.join.remote(store), options)
        self._timeline.mark("met")

    def _check_links(self, options: WaitOptions, keep: bool = True) -> None:
        """Measure the links between the workers, unless they are known or it is not wanted.

        Without `keep` only open them and check that they work: beside imports, which hold Python's lock, every link
        looks slow. To measure open links takes no time.
        """
        if not self.config.check_links or self.config.world_size == 1 or self.links is not None:
            return
        options = replace(options, timeout_s=bandwidth_check.TIMEOUT_S)
        try:
            links = self._on_each(lambda actor: actor.measure_links.remote(), options, remedies=no_remedies)[0]
        except WorkerError as error:
            message = str(error)
            if error.kind != OUT_OF_MEMORY:
                message = (
                    f"the workers started, but cannot exchange data: {message} On NVIDIA GPUs, "
                    f"{bandwidth_check.REMEDY}."
                )
            raise worker_error(message, error.kind, self.remedies) from error
        bandwidth_check.check_exact(links)
        self._timeline.mark("links" if keep else "links tried")
        if keep:
            bandwidth_check.keep(self.places, links)

    def _try_speed(self, options: WaitOptions) -> None:
        """Try how fast the workers are, unless it is known or not wanted."""
        if self.config.check_links and speed_check.is_wanted(self.places):
            options = replace(options, timeout_s=speed_check.TIMEOUT_S)
            speed_check.keep(self.places, self._on_each(lambda actor: actor.try_speed.remote(), options)[0])
            self._timeline.mark("speed")

    def reshape(self, config: SessionConfig, remedies: Remedies, wants_cancel: Callable[[], bool]) -> None:
        """Give the workers another configuration, which they can have by `SessionConfig.can_become`.

        Their processes, models and groups of other meshes stay. A failure ends them. Raises WorkerError; RunCancelled
        when cancelled, which ends them too.
        """
        options = WaitOptions(
            self._watchdog, wants_cancel=wants_cancel, cancel=raise_cancelled, timeout_s=config.start_timeout_s
        )
        began, mesh = time.monotonic(), config.mesh
        with self._alone(wants_cancel):
            if self._closed:
                raise self._ended(remedies)
            try:
                self.config, self.remedies = config, remedies
                self._watchdog.config = config
                self._check_links(options)
                self._try_speed(options)
                if (arrangement := self.arrangement) != self._arranged:
                    self._on_each(lambda actor: actor.reshape.remote(arrangement), options)
                    self._arranged = arrangement
            except BaseException:
                self.close()  # some ranks may have the other mesh
                raise
        how = "by the run" if config.by_run else f"as batch {mesh.batch} x ring {mesh.ring} x Ulysses {mesh.ulysses}"
        logger.info("the workers are arranged %s, in %.2f s", how, time.monotonic() - began)

    @property
    def arrangement(self) -> Arrangement:
        """How the ranks are to be arranged by this configuration."""
        return self.arrangement_by(self.config)

    def arrangement_by(self, config: SessionConfig) -> Arrangement:
        """Return how the ranks would be arranged by a configuration that they can have."""
        fast_ranks = bandwidth_check.fast_ranks_of(self.places) if config.by_run else 0
        speeds, memory = speed_check.speeds_of(self.places), memory_check.memory_of(self.places)
        return Arrangement(config.mesh, config.by_run, fast_ranks, speeds, memory)

    @property
    def links(self) -> Links | None:
        """The measured links between these workers' GPUs, if they were measured."""
        return bandwidth_check.known(self.places)

    def run(self, verb: Callable[..., R], *args: Any, **options: Any) -> R:
        """Call a verb on every rank and return rank 0's result. Takes and raises what `run_all` does."""
        return self.run_all(verb, *args, **options)[0]

    def run_all(
        self,
        verb: Callable[..., R],
        *args: Any,
        on_event: Callable[[Any], None] = lambda _: None,
        wants_cancel: Callable[[], bool] = lambda: False,
        remedies: Remedies | None = None,
    ) -> dict[int, R]:
        """Call a verb, a method of the service's class or Protocol, on every rank and return the results by rank.

        Only the name of `verb` is sent. `args` are put into the object store once. Events of rank 0 go to `on_event`
        in this thread. `remedies` replace those of the session. A failure ends the workers, unless all ranks met the
        same error at the same place; so does a cancel that they do not react to. Raises as `results_or_raise`, and as
        `refuse_within_step`.
        """
        remedies = remedies or self.remedies
        if not self.alive:
            raise self._ended(remedies)
        run_id = uuid.uuid4().hex
        shared = [put(argument) for argument in args]
        with self._alone(wants_cancel):
            if self._closed:  # by the watchdog, meanwhile
                raise self._ended(remedies)
            self._watchdog.begin(run_id)
            self._printed = {rank: output_sizes(RUNTIME.log_folder, place.pid) for rank, place in self.places.items()}
            refs = {rank: a.run.remote(run_id, verb.__name__, *shared) for rank, a in enumerate(self._actors)}
            stream = self._actors[0].events.remote(run_id)

            def cancel() -> None:
                for actor in self._actors:
                    actor.cancel.remote(run_id)

            outcome = wait_for_all(refs, WaitOptions(self._watchdog, on_event, wants_cancel, cancel), stream)
            states = WorkerStates(self.places) if outcome.is_clean else self._states(f"beginning to {verb.__name__}")
            stay = outcome.is_clean or self._can_continue(outcome)
        self.has_worked = self.has_worked or (outcome.is_clean and outcome.interruption is None)
        if not stay:
            # A rank that failed alone leaves the others in a collective that never ends.
            logger.warning("ending the workers")
            self._end_after_failure(outcome.failure)
        return results_or_raise(outcome, states, remedies, stay)

    def refuse_within_step(self) -> None:
        """Raise RuntimeError in a thread that handles an event of a run, which waits for it."""
        if self._runner == threading.get_ident():
            raise RuntimeError(
                "a node uses the workers from within a step of their run, in a callback say, and they do one run at a "
                "time. Remove the node, or have it load models and sample before or after this run"
            )

    @contextmanager
    def _alone(self, wants_cancel: Callable[[], bool]) -> Iterator[None]:
        """Wait for the end of another thread's run. Raises RunCancelled: when cancelled meanwhile. Raises as
        `refuse_within_step`.
        """
        self.refuse_within_step()
        while not self._running.acquire(timeout=POLL_S):
            if wants_cancel():
                raise RunCancelled
        try:
            self._runner = threading.get_ident()
            yield
        finally:
            self._runner = None
            self._running.release()

    def _ended(self, remedies: Remedies) -> WorkerError:
        if (failure := self._watchdog.failure) is not None:
            return to_error(failure, self._states(), remedies)
        return worker_error("the workers have ended: run the prompt again", RAY_LOST, remedies)

    def _can_continue(self, outcome: Outcome) -> bool:
        """Return whether the workers can do another run after a failed one.

        They can if all met the same error at the same place, so that none waits for another, and if the service can
        recover.
        """
        error = common_error(outcome)
        if error is None or outcome.failure is not None or outcome.overdue:
            return False
        options = WaitOptions(self._watchdog, timeout_s=_PROGRESS_S)
        try:
            progress = self._on_each(lambda actor: actor.progress.remote(), options).values()
            tallies = [of_rank.begun for of_rank in progress]
            if len({of_rank.beats for of_rank in progress}) > 1:
                return False
            # Where PyTorch does not count, assume that ranks refused an input at the same place.
            if not agree(tallies) and not (None in tallies and isinstance(error, ValueError)):
                return False
            options = replace(options, timeout_s=_RECOVER_S)
            return all(self._on_each(lambda actor: actor.recover.remote(), options).values())
        except Exception as reason:
            logger.debug("the workers cannot continue: %s", reason)
            return False

    def _on_each(
        self,
        call: Callable[[Any], Any],
        options: WaitOptions,
        actors: Sequence[Any] | None = None,
        remedies: Remedies | None = None,
    ) -> dict[int, Any]:
        """Call all actors, or the first ones. Return the results by rank."""
        refs = {rank: call(actor) for rank, actor in enumerate(self._actors if actors is None else actors)}
        return self._results(refs, options, remedies)

    def _results(
        self, refs: dict[int, ray.ObjectRef], options: WaitOptions, remedies: Remedies | None = None
    ) -> dict[int, Any]:
        return results_or_raise(wait_for_all(refs, options), self._states(), remedies or self.remedies)

    @property
    def phases(self) -> dict[int, str]:
        """The last reported phase of each rank."""
        return self._watchdog.phases

    @property
    def busy(self) -> bool:
        """Whether a verb is being called: another call would wait for its end, and is refused if made by its events."""
        return self._running.locked()

    @property
    def alive(self) -> bool:
        """Whether the workers can be called."""
        return not self._closed and ray.is_initialized() and self._watchdog.failure is None

    def can_take(self, config: SessionConfig) -> bool:
        """Return whether the workers can be called, and can have another configuration, or have this one."""
        return self.alive and self.config.can_become(config.as_in(self.config))

    def close(self) -> None:
        """End the workers and wait until they are gone. May be called twice; does not hang on a broken Ray."""
        self._closed = True
        with self._closing:  # the watchdog closes too, and a new session must wait for it
            self._close()

    def _close(self) -> None:
        self._watchdog.stop()
        actors, self._actors = list(self._actors), []
        group, self._group = self._group, None
        if not actors and group is None:
            return
        if self.config.is_local and RUNTIME.lost() is not None:
            RUNTIME.abandon()
        elif ray.is_initialized():
            try:
                with_timeout(lambda: placement.release(actors, group), _END_S, "the end of the workers")
            except Exception as error:
                logger.warning("%s", error)
        if self.config.is_local:
            kill_workers(place.pid for place in self.places.values())

    def _on_failure(self, failure: Failure) -> None:
        """Close the session if it is idle; a run in progress sees the failure itself. Called by the watchdog."""
        if not self._running.acquire(blocking=False):
            return
        try:
            if self._ready and not self._closed:
                logger.error("%s", to_error(failure, self._states(), self.remedies))
                self._end_after_failure(failure)
        finally:
            self._running.release()

    def _end_after_failure(self, failure: Failure | None) -> None:
        """Close the session. If Ray still works, call `on_failure`."""
        self.close()
        if failure is None or failure.kind != RAY_LOST:
            self._after_failure(self)

    def _states(self, idle: str = IDLE) -> WorkerStates:
        """Return what is known of the ranks now. `idle` is the phase of those that have not reported a new one yet."""
        lines = {rank: self._last_lines(rank, place) for rank, place in self.places.items()}
        phases = dict.fromkeys(range(self.config.world_size), STARTING) | self.phases
        return WorkerStates(self.places, {r: idle if phase == IDLE else phase for r, phase in phases.items()}, lines)

    def _last_lines(self, rank: int, place: Place) -> tuple[str, ...]:
        """Return what a rank said last: of a crash, else what it has logged, else what it has printed."""
        printed = printed_since(RUNTIME.log_folder, place.pid, self._printed.get(rank, {}))
        return crash_in(printed) or self._watchdog.last_lines(rank) or last_lines_of(printed)
