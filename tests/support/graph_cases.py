"""The ranks' work in tests of graphs: a backend without a GPU, and every family's forwards as graphs on it.

The backend captures nothing. It replays by calling the function that it was to capture, which reads the static inputs:
so everything but CUDA's own part is as on a GPU.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from comfy.cli_args import args
from matrix_cases import copied
from torch import Tensor

args.cpu = True  # before ComfyUI picks a device

from raylight.attention.kernels import kernel
from raylight.dev.zoo import families
from raylight.dev.zoo.family import Draw
from raylight.parallel import graph_inputs
from raylight.parallel.graph_capture import Cost
from raylight.parallel.graphs import ON, GraphPool
from raylight.parallel.mesh import MeshShape, build_mesh
from raylight.plans import plan_for
from raylight.worker.cuda_graphs import GraphedForward
from raylight.worker.sequence_parallel import apply_sequence_parallel

CPU = torch.device("cpu")
FORWARDS = 5  # as it is, recorded, captured and replayed, replayed twice


class FakeBackend:
    """Counts captures and replays; fails at capture while `fails`, and lacks `missing` bytes."""

    device = CPU

    def __init__(self) -> None:
        graph_inputs.treat_cpu_as_device()
        self.captures = self.replays = self.releases = 0
        self.fails: Exception | None = None
        self.missing = 0
        self.cost = Cost(1.0, 1.0, 0)
        self.held_bytes = 0

    def measured(self, function: Callable[[], Any]) -> tuple[Any, Cost]:
        return function(), self.cost

    def shortage(self, cost: Cost) -> int:
        return self.missing

    def released(self) -> None:
        self.releases, self.held_bytes = self.releases + 1, 0

    def capture(self, function: Callable[[], Any]) -> Any:
        self.captures += 1
        if self.fails is not None:
            raise self.fails
        self.held_bytes += 1
        return _Replayed(self, function)


@dataclass(frozen=True)
class _Replayed:
    backend: FakeBackend
    function: Callable[[], Any]

    def replay(self) -> Any:
        self.backend.replays += 1
        return self.function()


@dataclass(frozen=True)
class Outcome:
    """Of one call: whether every forward was equal to the eager one, how many were replayed, and why not."""

    equal: bool
    replays: int
    reasons: tuple[str, ...]
    failure: str = ""


def every_call(rank: int, world: int, names: tuple[str, ...], shape: MeshShape) -> dict[tuple[str, str], Outcome]:
    """Run each call of the families several times, with other tensors each time, as it is and as a graph."""
    mesh = build_mesh(shape, CPU)
    found = {}
    for name in names:
        family = families()[name]
        model = family.build()
        for call, make in family.calls.items():
            try:
                with torch.inference_mode():
                    found[name, call] = _repeated(model, make, mesh, fails=world > 1 and rank == world - 1)
            except Exception:
                found[name, call] = Outcome(False, 0, (), traceback.format_exc())
    return found


def _repeated(model: Any, make: Any, mesh: Any, fails: bool) -> Outcome:
    backend = FakeBackend()
    # One rank cannot capture, and runs its forwards as they are beside the replays of the others.
    backend.fails = RuntimeError("this rank cannot capture") if fails else None
    options: dict[str, Any] = {}
    split = apply_sequence_parallel(model.diffusion_model, plan_for(model.diffusion_model), mesh)
    graphed = None
    try:
        split.install(options, kernel("TORCH"))

        def forwards() -> list[Tensor]:
            results = []
            for turn in range(FORWARDS):
                given = copied(make(Draw(3 + turn)))
                own = options["transformer_options"] | given.pop("transformer_options", {}) | {"uuids": [turn]}
                results.append(model.apply_model(**given, transformer_options=own))
            return results

        expected = forwards()
        graphed = GraphedForward(model.diffusion_model, GraphPool(backend), lambda: None, split.tokens.begin)
        graphed.use(ON, "test", "")
        actual = forwards()
        reasons = tuple(sorted(graphed.reasons))
        assert model.diffusion_model.forward is not None
    finally:
        if graphed is not None:
            graphed.remove()
        split.remove()
    return Outcome(all(map(torch.equal, actual, expected)), backend.replays, reasons)
