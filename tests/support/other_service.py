"""Workers that open a service of tests, and what they tell of their memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from raylight.cluster import active_session
from raylight.cluster.config import ServiceSpec, SessionConfig
from raylight.driver import api, forward_channel, workers
from raylight.host.jobs import RankMemory
from raylight.host.worker_service import WorkerService

_SUPPORT = str(Path(__file__).parent)


@contextmanager
def served_by(factory: str) -> Iterator[None]:
    """Within this context, workers open the service of `factory`, "module:function" in this folder. None run before and
    after it.
    """
    own = workers.service_spec

    def spec(config: SessionConfig) -> ServiceSpec:
        made = own(config)
        return replace(made, factory=factory, python_path=(*made.python_path, _SUPPORT))

    with pytest.MonkeyPatch.context() as patch:
        api.end_workers(with_ray=False)
        patch.setattr(workers, "service_spec", spec)
        yield
        api.end_workers(with_ray=False)


def memory() -> list[RankMemory]:
    """What each rank tells of its memory."""
    session = active_session.running()
    assert session is not None
    return list(session.run_all(WorkerService.memory).values())


def gathers() -> int:
    """How many gathers each rank has made, as `kept_service` tells. All ranks tell the same."""
    (count,) = {rank.graphs for rank in memory()}
    return count


def kept() -> int:
    """The bytes of weights that stay gathered on each rank. All ranks tell the same."""
    (nbytes,) = {sum(model.kept_bytes for model in rank.models) for rank in memory()}
    return nbytes


def free_workers() -> None:
    """Have workers that are there, if any, release all that they have, as ComfyUI's "Unload Models" does on GPUs."""
    if (session := active_session.running()) is not None:
        forward_channel.drop()
        session.run_all(WorkerService.free)
