"""A worker on the CPU whose forwards are graphs, by the backend that captures nothing. It keeps gathered weights and
conditioning as if it had a large GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

from fake_graphs import FakeBackend
from kept_units_cases import LARGE, SimulatedMemory

from raylight.cluster.run import RankContext, Run
from raylight.host.jobs import RankMemory
from raylight.host.settings import HostSettings
from raylight.parallel import graph_inputs
from raylight.worker import cuda_graphs, resident_conds, sharded_patcher
from raylight.worker.resident_conds import ResidentConds
from raylight.worker.service import ModelService

_copied: list[ResidentConds] = []  # by whom, for each copy


class GraphService(ModelService):
    """Tells the number of replays so far where a GPU's worker tells the bytes that graphs hold."""

    def copied_conds(self, _: Run) -> int:
        """Tell how much conditioning was copied so far."""
        return len(_copied)

    def memory(self, run: Run) -> RankMemory:
        pool = cuda_graphs.pool_of(self._context.device)
        return replace(super().memory(run), graphs=len(pool), graph_bytes=pool.replays)


def open_service(context: RankContext, settings: HostSettings) -> GraphService:
    """Return the service of this worker."""
    graph_inputs.treat_cpu_as_device()
    cuda_graphs.pool_of(context.device, lambda _: FakeBackend())
    patch.object(sharded_patcher, "spare_memory", lambda _: SimulatedMemory(LARGE)).start()
    patch.object(resident_conds, "is_elsewhere", lambda *_: True).start()
    copied = ResidentConds._copied

    def count(conds: ResidentConds, *args: Any) -> Any:
        _copied.append(conds)
        return copied(conds, *args)

    patch.object(ResidentConds, "_copied", count).start()
    return GraphService(context, settings.gpu)
