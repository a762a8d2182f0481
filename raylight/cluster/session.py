"""A session: the workers of one configuration, from their start to their end."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

import ray
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from . import local_ray, placement
from .actor import Place, RankActor
from .config import ServiceSpec, SessionConfig
from .shared import SharedObjects
from .waiting import conclude, is_refusal, wait_for_all

logger = logging.getLogger(__name__)

_SHARED_OBJECTS = 8  # in the object store for as long as nothing takes their place


class Session:
    """The workers of one configuration. Use `raylight.cluster.current.session` to share one between prompts."""

    def __init__(self, config: SessionConfig, service: ServiceSpec) -> None:
        """Start the workers. Raises ConnectionError, RuntimeError or WorkerError; nothing is left running then."""
        self.config = config
        self.places: dict[int, Place] = {}
        self._actors: list[Any] = []
        self._group: Any = None
        self.shared = SharedObjects(_SHARED_OBJECTS)
        self._broken = False
        started = time.monotonic()
        try:
            local_ray.connect(config)
            self._group = placement.reserve(config)
            self._start(service)
            if config.is_local:
                local_ray.guard()
        except BaseException:
            self.close()
            raise
        logger.info(
            "%d workers ready in %.1f s: %s", config.world_size, time.monotonic() - started,
            "; ".join(str(place) for place in self.places.values()),
        )

    def _start(self, service: ServiceSpec) -> None:
        config = self.config
        actor = ray.remote(max_restarts=0, concurrency_groups={"control": 2})(RankActor)
        for rank in range(config.world_size):
            self._actors.append(actor.options(
                num_cpus=1,
                num_gpus=1 if config.device_type == "cuda" and not config.gpu_select else 0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank),
                runtime_env={"env_vars": placement.environment(config, service, rank)},
            ).remote(rank, config.world_size, config.device_type))
        timeout = config.start_timeout_s
        self.places = dict(enumerate(ray.get([a.place.remote() for a in self._actors], timeout=timeout)))
        store = self._actors[0].open_store.remote(self.places[0].host, config.collective_timeout_s)
        rendezvous = ray.get(store, timeout=timeout)
        joins = {rank: a.join.remote(rendezvous, config.mesh, service) for rank, a in enumerate(self._actors)}
        conclude(wait_for_all(joins, None, _ignore, _never, _nothing), self.places)

    def run(self, method: str, *args: Any, on_event: Callable[[Any], None] | None = None,
            wants_cancel: Callable[[], bool] | None = None) -> Any:
        """Call a method of the service on every rank and return rank 0's result, as `run_all`."""
        return self.run_all(method, *args, on_event=on_event, wants_cancel=wants_cancel)[0]

    def run_all(self, method: str, *args: Any, on_event: Callable[[Any], None] | None = None,
                wants_cancel: Callable[[], bool] | None = None) -> dict[int, Any]:
        """Call a method of the service on every rank and return the results by rank.

        `args` are put into the object store once. Events of rank 0 are given to `on_event` in this thread.
        Raises what `conclude` raises; a failure that is no refusal of all ranks ends the workers.
        """
        run_id = uuid.uuid4().hex
        shared = [ray.put(argument) for argument in args]
        refs = {rank: a.run.remote(run_id, method, *shared) for rank, a in enumerate(self._actors)}
        stream = self._actors[0].events.remote(run_id)

        def cancel() -> None:
            for actor in self._actors:
                actor.cancel.remote(run_id)

        outcome = wait_for_all(refs, stream, on_event or _ignore, wants_cancel or _never, cancel)
        if outcome.failures and not is_refusal(outcome, self.places):
            # A rank that failed alone leaves the others inside a collective that never ends.
            logger.warning("ending the workers: they cannot go on after a failure")
            self.close()
        return conclude(outcome, self.places)

    @property
    def alive(self) -> bool:
        return not self._broken and ray.is_initialized()

    def close(self) -> None:
        """End the workers. Harmless when repeated."""
        self._broken = True
        if not ray.is_initialized():
            return
        for actor in self._actors:
            ray.kill(actor)
        self._actors.clear()
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None


def _ignore(_: Any) -> None:
    """No listener."""


def _never() -> bool:
    return False


def _nothing() -> None:
    """Starting cannot be cancelled yet."""
