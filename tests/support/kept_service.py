"""A worker that counts gathers, and runs out of memory on request. On the CPU it keeps gathered weights as if it had a
large GPU.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from comfy.ldm.flux.model import Flux
from comfy.model_base import BaseModel
from counting import gathered
from kept_units_cases import LARGE, SimulatedMemory

from raylight.cluster.run import RankContext, Run
from raylight.host.jobs import RankMemory
from raylight.host.settings import HostSettings
from raylight.worker import sharded_patcher
from raylight.worker.service import ModelService

_gathered: list = []
_counting = ExitStack()  # until the process ends


class KeptService(ModelService):
    """Tells the number of gathers so far where a worker tells that of its graphs."""

    def memory(self, run: Run) -> RankMemory:
        return replace(super().memory(run), graphs=len(_gathered))

    def run_out(self, run: Run, forwards: int) -> None:
        """Run out of memory on the last rank after this many forwards that begin with memory held to be faster: on the
        CPU of Flux, on GPUs, where a graph may be replayed, of what a sampler calls.
        """
        begun = 0

        def begin() -> None:
            nonlocal begun
            begun += self.spare_bytes() > 0
            if begun > forwards and self._context.rank == self._context.world_size - 1:
                raise torch.OutOfMemoryError("CUDA out of memory (simulated)")

        if self._context.device.type == "cpu":
            torch.nn.modules.module.register_module_forward_pre_hook(
                lambda module, _: begin() if isinstance(module, Flux) else None
            )
            return
        apply_model = BaseModel.apply_model

        def apply(model: BaseModel, *args: Any, **kwargs: Any) -> Any:
            begin()
            return apply_model(model, *args, **kwargs)

        patch.object(BaseModel, "apply_model", apply).start()


def open_service(context: RankContext, settings: HostSettings) -> KeptService:
    """Return the service of this worker."""
    global _gathered
    _gathered = _counting.enter_context(gathered())
    if context.device.type == "cpu":
        patch.object(sharded_patcher, "spare_memory", lambda _: SimulatedMemory(LARGE)).start()
    return KeptService(context, settings.gpu)
