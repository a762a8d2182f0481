"""The ranks' work in tests of graphs: every family's forwards as they are, and as graphs without a GPU."""

from __future__ import annotations

import traceback
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from comfy.cli_args import args
from fake_graphs import CPU, FakeBackend, cpu_as_device, forbid_captures
from torch import Tensor
from torch.utils._pytree import tree_map_only

args.cpu = True  # before ComfyUI picks a device

from raylight.attention.kernels import kernel
from raylight.dev.zoo import families
from raylight.dev.zoo.family import Draw
from raylight.parallel.graph_capture import CudaBackend
from raylight.parallel.graph_pool import GraphPool
from raylight.parallel.graphs import ON
from raylight.parallel.mesh import MeshShape, build_mesh, world_axis
from raylight.plans import plan_for
from raylight.sharding.fsdp import announce_to, reset, shard
from raylight.worker.cuda_graphs import GraphedForward
from raylight.worker.forward_kinds import copied
from raylight.worker.sequence_parallel import apply_sequence_parallel

FORWARDS = 5  # as it is, recorded, captured and replayed, replayed twice


@dataclass(frozen=True)
class Outcome:
    """Of one call: whether every forward was equal to the eager one, how many were replayed, and why not.

    `error` is the largest relative L2.
    """

    equal: bool
    replays: int
    reasons: tuple[str, ...]
    failure: str = ""
    error: float = 0.0


def on_one_rank(rank: int, world: int, names: tuple[str, ...]) -> dict[tuple[str, str], Outcome]:
    """As `every_call` in a world of one rank, of which there are `world` beside each other: each takes its part of the
    families.
    """
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return every_call(0, 1, names[rank::world], MeshShape())


def every_call(
    rank: int,
    world: int,
    names: tuple[str, ...],
    shape: MeshShape,
    on_gpus: bool = False,
    last_fails: bool = True,
    shards: bool = False,
) -> dict[tuple[str, str], Outcome]:
    """Run each call of the families several times, with other tensors each time, as it is and as a graph.

    With `last_fails` the last of several ranks cannot capture, and runs as it is beside the replays of the others. With
    `shards` weights are sharded over all ranks, and graphs have the hooks in them that gather these.
    """
    device = torch.device("cuda", rank) if on_gpus else CPU
    mesh = build_mesh(shape, device)
    fails = last_fails and world > 1 and rank == world - 1
    found = {}
    for name in names:
        family = families()[name]
        model = family.build()
        diffusion_model = model.diffusion_model
        # As workers do: one alone splits nothing.
        split = apply_sequence_parallel(diffusion_model, plan_for(diffusion_model), mesh) if world > 1 else None
        if shards:
            weights = {name: weight.detach().clone() for name, weight in diffusion_model.named_parameters()}
            with torch.no_grad():
                shard(diffusion_model, weights, world_axis(mesh), device)
        else:
            model = model.to(device)
        for call, make in family.calls.items():
            if on_gpus and make(Draw(3)).get("transformer_options"):
                continue  # patches whose own tensors are on the CPU
            try:
                with torch.inference_mode(not shards), torch.no_grad(), nullcontext() if on_gpus else cpu_as_device():
                    found[name, call] = _repeated(model, split, make, device, fails, shards)
            except Exception:
                found[name, call] = Outcome(False, 0, (), traceback.format_exc())
        if split is not None:
            split.remove()
    return found


def _repeated(model: Any, split: Any, make: Any, device: torch.device, fails: bool, shards: bool) -> Outcome:
    backend: Any = CudaBackend(device) if device.type == "cuda" else FakeBackend()
    pool = GraphPool(backend)
    options: dict[str, Any] = {"transformer_options": {}}
    diffusion_model = model.diffusion_model
    graphed = handle = None
    try:
        if split is not None:
            split.install(options, kernel("TORCH", device))

        def forwards() -> list[Tensor]:
            results = []
            for turn in range(FORWARDS):
                given = tree_map_only(Tensor, lambda tensor: tensor.to(device), copied(make(Draw(3 + turn))))
                own = options["transformer_options"] | given.pop("transformer_options", {}) | {"uuids": [turn]}
                results.append(model.apply_model(**given, transformer_options=own))
            return results

        expected = forwards()
        graphed = GraphedForward(diffusion_model, pool, lambda: None, lambda: _begin(diffusion_model, split))
        graphed.use(ON, "test", "", announce_to(diffusion_model))
        if fails:
            handle = forbid_captures(diffusion_model, backend)
        actual = forwards()
        reasons = tuple(sorted(graphed.reasons))
        replays = pool.replays
        if device.type == "cuda":
            torch.rand(1, device=device)  # the generator is usable after a failed capture, too
    finally:
        if handle is not None:
            handle.remove()
        if graphed is not None:
            graphed.remove()
    error = max(
        ((one - other).float().norm() / other.float().norm()).item()
        for one, other in zip(actual, expected, strict=True)
    )
    return Outcome(all(map(torch.equal, actual, expected)), replays, reasons, error=error)


def _begin(model: torch.nn.Module, split: Any) -> None:
    if split is not None:
        split.tokens.begin()
    reset(model)
