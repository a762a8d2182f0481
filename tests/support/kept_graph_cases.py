"""The ranks' work in tests of graphs of a model whose gathered weights stay on the GPU."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from kept_units_cases import LARGE, SimulatedMemory  # first: it tells ComfyUI whether there is a GPU

# isort: split
from counting import gathered
from fake_graphs import CPU, FakeBackend, cpu_as_device, forbid_captures
from torch import Tensor

from raylight.dev.zoo import families
from raylight.dev.zoo.family import Draw
from raylight.host.checkpoint import MappedModel
from raylight.parallel.graph_capture import CudaBackend
from raylight.parallel.graph_pool import GraphPool
from raylight.parallel.graphs import ON
from raylight.parallel.mesh import MeshShape, build_mesh, world_axis
from raylight.sharding.fsdp import announce_to, keep_steady, reset
from raylight.worker import sharded_patcher
from raylight.worker.cuda_graphs import GraphedForward
from raylight.worker.forward_kinds import copied
from raylight.worker.kept_units import GraphsOfJob
from raylight.worker.sharded_patcher import build_sharded


@dataclass(frozen=True)
class Phase:
    """Of some forwards: whether all gave the whole model's result, those that were replays, the units that were
    gathered, the units that are kept then, and the graphs that there are.
    """

    equal: bool
    replays: int
    gathers: int
    kept: int
    graphs: int


def phases(rank: int, world: int, offload: bool, device_type: str = "cpu") -> tuple[int, dict[str, Phase]]:
    """Return the number of units, and what forwards do as kept units come, change and go. The last of several ranks
    cannot capture, and runs as it is beside the replays of the others.
    """
    device = torch.device("cuda", rank) if device_type == "cuda" else CPU
    family = families()["Wan T2V"]
    make = next(iter(family.calls.values()))
    whole, model = family.build().to(device), family.build()
    shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    mesh = world_axis(build_mesh(MeshShape(batch=world), device))
    simulated = patch.object(sharded_patcher, "spare_memory", lambda _: SimulatedMemory(LARGE))
    with torch.no_grad(), nullcontext() if device_type == "cuda" else simulated:
        patcher, _ = build_sharded(MappedModel(model, {}, device, {}, shapes), mesh, offload)
    diffusion_model, kept = model.diffusion_model, patcher.weights.kept
    backend: Any = CudaBackend(device) if device_type == "cuda" else FakeBackend()
    pool = GraphPool(backend)
    graphed = GraphedForward(diffusion_model, pool, lambda: None, lambda: reset(diffusion_model))
    if rank == world - 1 > 0:
        forbid_captures(diffusion_model, backend)

    def begin() -> None:
        kept.begin(True, True, "", lambda: None, lambda: 0, GraphsOfJob(lambda: graphed.expects_any, True))
        keep_steady(diffusion_model, True, graphed.drop)
        graphed.use(ON, "test", "", announce_to(diffusion_model))

    def forwards(count: int, rows: int = 1) -> Phase:
        equal, before = True, pool.replays
        with torch.no_grad(), nullcontext() if device_type == "cuda" else cpu_as_device(), gathered() as units:
            for turn in range(count):
                given = {name: _moved(value, device, rows) for name, value in make(Draw(3 + turn)).items()}
                expected = whole.apply_model(**copied(given))
                equal &= torch.equal(model.apply_model(**given), expected)
        return Phase(equal, pool.replays - before, len(units), kept._gathering.number, len(pool))

    begin()
    found = {"measured, and kept": forwards(3), "captured": forwards(3)}
    begin()
    found["another run"] = forwards(2)
    _halve(diffusion_model, whole)
    kept.forget()
    found["other weights"] = forwards(2)
    if rank == 0:
        kept.release()
    begin()
    found["after a rank has lost them"] = forwards(4)
    found["larger"] = forwards(2, rows=2)
    found["as before"] = forwards(4)
    graphed.remove()
    return kept._units, found


def _moved(value: Any, device: torch.device, rows: int) -> Any:
    return torch.cat([value] * rows).to(device) if isinstance(value, Tensor) else value


def _halve(sharded: torch.nn.Module, whole: Any) -> None:
    """Change every weight in place, in the shards and in the whole model."""
    with torch.no_grad():
        for parameter in (*sharded.parameters(), *whole.diffusion_model.parameters()):
            (parameter._local_tensor if hasattr(parameter, "_local_tensor") else parameter).mul_(0.5)
