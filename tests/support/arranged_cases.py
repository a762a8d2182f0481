"""A model that is arranged on one mesh after another, in one rank."""

from __future__ import annotations

from pathlib import Path

import torch
from comfy.cli_args import args
from fake_graphs import FakeBackend, cpu_as_device
from torch import nn
from torch.distributed import distributed_c10d

args.cpu = True  # before ComfyUI picks a device

from raylight.host.recipe import REPLICATED, SHARDED, ModelRecipe
from raylight.parallel.graph_pool import GraphPool
from raylight.parallel.graphs import ForwardGraphs
from raylight.parallel.mesh import Meshes, MeshShape
from raylight.worker.parallelize import load_parallel
from raylight.worker.patcher import mode_of

CPU = torch.device("cpu")


def traces(model: nn.Module) -> tuple[int, bool]:
    """The number of hooks of a model, and whether it has a forward of its own."""
    hooks = sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())
    return hooks, "forward" in vars(model)


def arrange_many_times(rank: int, world: int, path: Path) -> dict[str, tuple[list, list]]:
    """Return what is on the model by sharding, after one round over all meshes and after many."""
    shapes = [MeshShape(ulysses=world), MeshShape(batch=world), MeshShape(ring=world), MeshShape(world // 2, 1, 2)]
    found = {}
    for sharding in (REPLICATED, SHARDED):
        with mode_of(sharding):
            meshes = Meshes(CPU)
            model = load_parallel(ModelRecipe.of(str(path), "default", sharding), meshes.of(shapes[0]), CPU)
            first, last = [], []
            for turn in range(6):
                noted = first if turn == 0 else last
                noted.clear()
                for shape in shapes:
                    model.parallel.arrange(meshes.of(shape))
                    noted.append(traces(model.patcher.model.diffusion_model))
            model.parallel.remove()
            last.append(traces(model.patcher.model.diffusion_model)[1])
        found[sharding] = first, last
    return found


def graphs_of_ended_meshes(rank: int, world: int) -> list[int]:
    """Return how many graphs there are with a mesh that was kept, and once another has taken its place."""
    meshes, pool = Meshes(CPU, limit=1), GraphPool(FakeBackend())
    model = ForwardGraphs("Model", lambda args, *_: args[0] * 2, lambda: None, pool)
    shape, counts = MeshShape(batch=world), []
    with cpu_as_device(), torch.inference_mode():
        for _ in range(3):
            meshes.of(shape)
            model.call("context", list, True, (torch.ones(1),), {}, {})
    for one in (shape, MeshShape(world // 2, 1, 2)):
        meshes.of(one)
        counts.append(len(pool))
    return counts


def count_groups(rank: int, world: int, limit: int) -> list[int]:
    """Return how many process groups there are, each time after going through all meshes of `world` ranks."""
    meshes = Meshes(CPU, limit)
    shapes = [
        MeshShape(batch, ring, world // batch // ring)
        for batch in (1, 2, 4)
        for ring in (1, 2, 4)
        if batch * ring <= world
    ]
    counts = []
    for _ in range(4):
        for shape in shapes:
            assert meshes.of(shape).shape == (shape.batch, shape.ring, shape.ulysses)
            assert meshes.of(shape) is meshes.of(shape)
        counts.append(len(distributed_c10d._world.pg_map))
    return counts


def keep_one(rank: int, world: int) -> tuple[bool, int]:
    """Return whether a mesh is kept while others come and go, and how many meshes there are with it."""
    meshes = Meshes(CPU, 2)
    kept = meshes.of(MeshShape(ulysses=world), keep=True)
    for shape in (MeshShape(batch=world), MeshShape(ring=world), MeshShape(2, 1, world // 2)):
        meshes.of(shape)
    sum_of_ranks = torch.ones(1)
    torch.distributed.all_reduce(sum_of_ranks, group=kept.get_group("ulysses"))
    return meshes.of(MeshShape(ulysses=world)) is kept, int(sum_of_ranks)
