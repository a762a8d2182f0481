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
from raylight.host.jobs import ModelJob
from raylight.host.recipe import SHARDED, FileStamp, ModelRecipe
from raylight.parallel.degrees import Arrangement, DegreesByRun
from raylight.parallel.external_strategies import OURS
from raylight.parallel.graph_capture import CudaBackend
from raylight.parallel.graph_pool import GraphPool
from raylight.parallel.graphs import ON
from raylight.parallel.mesh import Meshes, MeshShape, build_mesh, world_axis
from raylight.parallel.process_group import smallest
from raylight.sharding.fsdp import announce_to, keep_steady, reset
from raylight.worker import cuda_graphs, sharded_patcher
from raylight.worker.cuda_graphs import GraphedForward
from raylight.worker.forward_kinds import copied
from raylight.worker.kept_units import GraphsOfJob, KeptUnits
from raylight.worker.parallel_model import ParallelModel
from raylight.worker.patcher import mode_of
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


@dataclass(frozen=True)
class Forward:
    """Of one forward: its error in standard deviations, whether it was a replay, and whether ranks agreed before it on
    what is kept, and how many units that is.
    """

    error: float
    replayed: bool
    agreed: bool
    kept: int


def numbers_of_rows(rank: int, world: int, runs: int, rows: tuple[int, ...]) -> tuple[list[Forward], list[str]]:
    """Return what forwards of so many rows each do in some runs that choose degrees, and what is told of these. The
    last of the ranks cannot capture, and runs as it is beside the replays of the others.
    """
    family = families()["Wan T2V"]
    make = next(iter(family.calls.values()))
    whole, base = family.build(), family.build()
    shapes = {key: tuple(parameter.shape) for key, parameter in base.named_parameters()}
    backend, meshes, shape = FakeBackend(), Meshes(CPU), MeshShape(ulysses=world)
    pool = cuda_graphs.pool_of(CPU, lambda _: backend)
    if rank == world - 1:
        forbid_captures(base.diffusion_model, backend)
    mesh, by_run = meshes.of(shape, keep=True), DegreesByRun(Arrangement(shape, by_run=True), meshes)
    parallel = ParallelModel(base, mesh, CPU, by_run)
    with patch.object(sharded_patcher, "spare_memory", lambda _: SimulatedMemory(LARGE)):
        patcher, _ = build_sharded(MappedModel(base, {}, CPU, {}, shapes), world_axis(mesh), False)
    parallel.finalize_hooks()
    kept, found, told = patcher.weights.kept, [], []
    job = ModelJob(ModelRecipe("Wan", "default", FileStamp(1), SHARDED), "TORCH", OURS, graphs=ON)

    def forward(number: int, draw: int, options: dict[str, Any]) -> None:
        given = {name: _moved(value, CPU, number) for name, value in make(Draw(draw)).items()}
        expected, before = whole.apply_model(**copied(given)), pool.replays
        with patch.object(KeptUnits, "_decide", autospec=True, side_effect=KeptUnits._decide) as decide:
            actual = base.apply_model(**given, transformer_options=dict(options))
        error = ((actual - expected).abs().max() / expected.std()).item()
        found.append(Forward(error, pool.replays > before, decide.called, kept._gathering.number))

    with torch.no_grad(), cpu_as_device(), mode_of(SHARDED):
        for run in range(runs):
            own = patcher.clone()
            graphs = GraphsOfJob(lambda: parallel.expects_graphs, True)
            kept.begin(True, True, "", parallel.split_now, lambda: 0, graphs)
            parallel.install(own.model_options, job, told.append)
            parallel.use_graphs(job, "")
            for step, number in enumerate(rows):
                forward(number, 3 + step, own.model_options["transformer_options"])
            assert smallest(rank + run) == run, "all ranks are here"
    return found, told


def _moved(value: Any, device: torch.device, rows: int) -> Any:
    return torch.cat([value] * rows).to(device) if isinstance(value, Tensor) else value


def _halve(sharded: torch.nn.Module, whole: Any) -> None:
    """Change every weight in place, in the shards and in the whole model."""
    with torch.no_grad():
        for parameter in (*sharded.parameters(), *whole.diffusion_model.parameters()):
            (parameter._local_tensor if hasattr(parameter, "_local_tensor") else parameter).mul_(0.5)
