"""Two ranks of which one gives back GPU memory, with a whole model and a split one."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import torch
from comfy.cli_args import args

args.cpu = not torch.cuda.is_available()  # before ComfyUI picks a device

import comfy.model_management

from raylight.host.checkpoint import load_mapped
from raylight.host.recipe import REPLICATED, SHARDED, FileStamp, ModelRecipe
from raylight.parallel.mesh import MeshShape, build_mesh, world_axis
from raylight.worker.model_cache import CachedModel, ModelCache
from raylight.worker.patcher import mode_of
from raylight.worker.replicated_patcher import build_replicated
from raylight.worker.sharded_patcher import build_sharded

CPU, GPU = torch.device("cpu"), torch.device("cpu", 0)
Sizes = tuple[float, float]


def sizes_after_each(rank: int, world: int, path: Path, wanted: list[dict[int, float]]) -> list[Sizes]:
    """How much of the whole model and of this rank's shards is on the GPU after each request, as shares of their
    sizes. `wanted` is by rank, in sizes of the whole model.
    """
    models = ModelCache(torch.device("cuda"), world)
    whole = _whole(path)
    split = _split(path, world)
    for model in (whole, split):
        models.add(model)

    def reserved(_: torch.device) -> int:
        return sum(model.patcher.loaded_size() for model in models.all())

    found = []
    with (
        patch.object(torch.cuda, "memory_reserved", reserved),
        patch.object(comfy.model_management, "reset_cast_buffers", lambda: None),
    ):
        for one in wanted:
            share = one.get(rank)
            models.give_back(None if share is None else int(share * whole.patcher.model_size()))
            found.append(tuple(model.patcher.loaded_size() / model.patcher.model_size() for model in (whole, split)))
    return found


def _whole(path: Path) -> CachedModel:
    with mode_of(REPLICATED):
        mapped = load_mapped(str(path), {})
        patcher, own_bytes = build_replicated(mapped, CPU, in_file=True)
        patcher.load(GPU, full_load=True)
    return CachedModel(ModelRecipe("whole", "default", FileStamp(1)), patcher, None, {}, {}, own_bytes)


def _split(path: Path, world: int) -> CachedModel:
    with mode_of(SHARDED):
        mesh = world_axis(build_mesh(MeshShape(ulysses=world), CPU))
        patcher, report = build_sharded(load_mapped(str(path), {}), mesh, offload=False)
    return CachedModel(ModelRecipe("split", "default", FileStamp(1), SHARDED), patcher, None, {}, {}, report.bytes)
