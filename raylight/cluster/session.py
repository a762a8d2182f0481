"""A session: the workers of one configuration, from their start to their end."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raylight.parallel.bandwidth import Links
from raylight.parallel.heartbeat import agree

from . import bandwidth_check, diagnosis, placement, ray_runtime
from .actor import Place, RankActor
from .collect import Outcome, WaitOptions, met_alike, results_or_raise, wait_for_all
from .config import ServiceSpec, SessionConfig
from .diagnosis import Fault, WorkerStates, is_store_full, store_full, to_error
from .errors import OUT_OF_MEMORY, RAY_LOST, RunCancelled, WorkerError
from .object_store import ObjectCache
from .ray_runtime import RUNTIME
from .status import IDLE, STARTING
from .timeouts import with_timeout
from .watchdog import Watchdog

logger = logging.getLogger(__name__)
R = TypeVar("R")

_SHARED_OBJECTS = 8  # in the object store for as long as nothing takes their place
_PUT_S = 120.0
_END_S = 10.0
_STAND_S, _SETTLE_S = 5.0, 10.0


class Session:
    """The workers of one configuration. Use `raylight.cluster.active_session.session` to share one between prompts."""

    def __init__(
        self, config: SessionConfig, service: ServiceSpec, wants_cancel: Callable[[], bool] = lambda: False
    ) -> None:
        """Start the workers. Raises ConnectionError, RuntimeError, WorkerError or RunCancelled; no worker is left
        then."""
        self.config = config
        self.places: dict[int, Place] = {}
        self.shared = ObjectCache(_SHARED_OBJECTS, self._put)
        self._actors: list[Any] = []
        self._group: Any = None
        self._watchdog: Watchdog | None = None
        self._printed: dict[int, dict[str, int]] = {}
        self._ready, self._broken = False, False
        self._running, self._closing = threading.Lock(), threading.Lock()
        started = time.monotonic()
        try:
            RUNTIME.connect(config, wants_cancel)
            self._group = placement.reserve(config, wants_cancel)
            self._start(service, wants_cancel)
        except BaseException:
            self.close()
            raise
        self._ready = True
        logger.info(
            "%d workers ready in %.1f s: %s",
            config.world_size,
            time.monotonic() - started,
            "; ".join(str(place) for place in self.places.values()),
        )

    def _start(self, service: ServiceSpec, wants_cancel: Callable[[], bool]) -> None:
        config = self.config
        actor = ray.remote(max_restarts=0, concurrency_groups={"control": 2, "watch": 1})(RankActor)
        for rank in range(config.world_size):
            self._actors.append(
                actor.options(
                    num_cpus=1,
                    num_gpus=1 if config.device_type == "cuda" and not config.gpu_select else 0,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(
                        self._group, placement_group_bundle_index=rank
                    ),
                    runtime_env={"env_vars": placement.environment(config, service, rank)},
                ).remote(rank, config.world_size, config.device_type, logging.getLogger().level)
            )
        self._watchdog = Watchdog(config, dict(enumerate(self._actors)), self._on_fault)

        def of_each(
            ask: Callable[[Any], Any], timeout_s: float = config.start_timeout_s, actors: Sequence[Any] = self._actors
        ) -> dict[int, Any]:
            refs = {rank: ask(actor) for rank, actor in enumerate(actors)}
            heed = WaitOptions(
                wants_cancel=wants_cancel, cancel=_raise_cancelled, fault=self._fault, timeout_s=timeout_s
            )
            return results_or_raise(wait_for_all(refs, heed=heed), config.world_size, self._scene())

        self.places = dict(sorted(of_each(lambda actor: actor.place.remote()).items()))
        self._watchdog.know(self.places)
        host = self.places[0].host
        rendezvous = of_each(
            lambda actor: actor.open_store.remote(host, config.collective_timeout_s), actors=self._actors[:1]
        )[0]
        of_each(lambda actor: actor.join.remote(rendezvous, config.mesh, service))
        if config.check_links and config.world_size > 1 and self.links is None:
            try:
                links = of_each(lambda actor: actor.try_links.remote(), bandwidth_check.TIMEOUT_S)[0]
            except WorkerError as error:
                if error.kind == OUT_OF_MEMORY:
                    raise
                raise WorkerError(
                    f"the workers started, but cannot talk to each other: {error} On NVIDIA GPUs, "
                    f"{bandwidth_check.REMEDY}.",
                    error.kind,
                ) from error
            bandwidth_check.keep(self.places, links)

    @property
    def links(self) -> Links | None:
        """What is known of the ways between these workers."""
        return bandwidth_check.known(self.places.values())

    def run(
        self,
        verb: Callable[..., R],
        *args: Any,
        on_event: Callable[[Any], None] | None = None,
        wants_cancel: Callable[[], bool] | None = None,
    ) -> R:
        """Call a verb on every rank and return rank 0's result, as `run_all`."""
        return self.run_all(verb, *args, on_event=on_event, wants_cancel=wants_cancel)[0]

    def run_all(
        self,
        verb: Callable[..., R],
        *args: Any,
        on_event: Callable[[Any], None] | None = None,
        wants_cancel: Callable[[], bool] | None = None,
    ) -> dict[int, R]:
        """Call a verb, a method of the service's class or Protocol, on every rank and return the results by rank.

        Only the name of `verb` is sent. `args` are put into the object store once. Events of rank 0 are given to
        `on_event` in this thread. Raises what `results_or_raise` raises. A failure ends the workers unless all of them
        have met it alike and in step; so does a cancel that they do not heed.
        """
        if not self.alive:
            raise WorkerError("the workers have ended: run the prompt again", RAY_LOST)
        run_id = uuid.uuid4().hex
        shared = [self._put(argument) for argument in args]
        with self._running:
            self._watchdog.begin(run_id)
            if self.config.is_local:
                self._printed = {rank: diagnosis.printed(place) for rank, place in self.places.items()}
            refs = {rank: a.run.remote(run_id, verb.__name__, *shared) for rank, a in enumerate(self._actors)}
            stream = self._actors[0].events.remote(run_id)

            def cancel() -> None:
                for actor in self._actors:
                    actor.cancel.remote(run_id)

            outcome = wait_for_all(
                refs,
                stream,
                WaitOptions(
                    on_event or (lambda _: None),
                    wants_cancel or (lambda: False),
                    cancel,
                    lambda since_s: diagnosis.is_overdue(since_s, self._watchdog.phases.values()),
                    self._fault,
                ),
            )
            scene = WorkerStates(self.places) if outcome.is_clean else self._scene(f"beginning to {verb.__name__}")
            stay = outcome.is_clean or self._may_stay(outcome)
        if not stay:
            # A rank that failed alone leaves the others inside a collective that never ends.
            logger.warning("ending the workers, which start anew with the next prompt")
            self.close()
        return results_or_raise(outcome, self.config.world_size, scene, stay)

    def _may_stay(self, outcome: Outcome) -> bool:
        """Whether the workers can go on after a run that has failed: all of them have met the same error at the same
        place, so that none waits for another, and what they hold is ready for the next run."""
        cause = met_alike(outcome, self.config.world_size)
        if cause is None or outcome.fault is not None or outcome.overdue:
            return False
        try:
            standings = self._of_each(lambda actor: actor.stand.remote(), _STAND_S).values()
            tallies = [standing.begun for standing in standings]
            if len({standing.beats for standing in standings}) > 1:
                return False
            # Where PyTorch does not count, a refusal of an input is trusted to be in step.
            if not agree(tallies) and not (None in tallies and isinstance(cause, ValueError)):
                return False
            return all(self._of_each(lambda actor: actor.settle.remote(), _SETTLE_S).values())
        except Exception as error:
            logger.debug("the workers cannot go on: %s", error)
            return False

    def _of_each(self, ask: Callable[[Any], Any], timeout_s: float) -> dict[int, Any]:
        refs = {rank: ask(actor) for rank, actor in enumerate(self._actors)}
        outcome = wait_for_all(refs, heed=WaitOptions(fault=self._fault, timeout_s=timeout_s))
        return results_or_raise(outcome, self.config.world_size, WorkerStates(self.places))

    @property
    def phases(self) -> dict[int, str]:
        """What each rank was at when it was last heard of."""
        return {} if self._watchdog is None else self._watchdog.phases

    @property
    def alive(self) -> bool:
        """Whether the workers can be called."""
        return not self._broken and ray.is_initialized() and self._fault() is None

    def close(self) -> None:
        """End the workers, and wait until they have gone. Harmless when repeated; does not hang on a broken Ray."""
        self._broken = True
        with self._closing:  # the watchdog does so too, and who starts others must wait for it
            self._close()

    def _close(self) -> None:
        if self._watchdog is not None:
            self._watchdog.stop()
        actors, self._actors = list(self._actors), []
        group, self._group = self._group, None
        if not actors and group is None:
            return
        if self.config.is_local and RUNTIME.lost() is not None:
            RUNTIME.abandon()
        elif ray.is_initialized():
            try:
                with_timeout(lambda: _give_back(actors, group), _END_S, "the end of the workers")
            except Exception as error:
                logger.warning("%s", error)
        if self.config.is_local:
            ray_runtime.kill_workers(place.pid for place in self.places.values())

    def _put(self, value: Any) -> ray.ObjectRef:
        """A reference to an object in Ray's store. Raises StoreFull."""
        try:
            return with_timeout(lambda: ray.put(value), _PUT_S, "sending to the workers")
        except Exception as error:
            if not isinstance(error, TimeoutError) and not is_store_full(error):
                raise
            raise store_full("what goes to the workers", error) from error

    def _fault(self) -> Fault | None:
        return None if self._watchdog is None else self._watchdog.fault

    def _on_fault(self, fault: Fault) -> None:
        """Called by the watchdog. A run that is under way sees the fault itself."""
        if not self._running.acquire(blocking=False):
            return
        try:
            if self._ready and not self._broken:
                logger.error("%s", to_error(fault, self._scene()))
                logger.error("the workers have ended, and start anew with the next prompt")
                self.close()
        finally:
            self._running.release()

    def _scene(self, at_least: str = IDLE) -> WorkerStates:
        """What is known now; ranks that have not told yet what they do are `at_least` at that."""
        if self._watchdog is None:
            return WorkerStates(self.places)
        lines = {
            rank: self._watchdog.last_lines(rank) or diagnosis.last_output(place, self._printed.get(rank, {}))
            for rank, place in self.places.items()
        }
        phases = dict.fromkeys(range(self.config.world_size), STARTING) | self._watchdog.phases
        phases = {rank: at_least if phase == IDLE else phase for rank, phase in phases.items()}
        return WorkerStates(self.places, phases, lines)


def _give_back(actors: list[Any], group: Any) -> None:
    for actor in actors:
        ray.kill(actor)
    if group is not None:
        remove_placement_group(group)


def _raise_cancelled() -> Any:
    raise RunCancelled
