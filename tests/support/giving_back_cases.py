"""Two ranks of which one gives back GPU memory, with a whole model and a split one."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from comfy.cli_args import args

args.cpu = not torch.cuda.is_available()  # before ComfyUI picks a device

import comfy.model_management
from torch import nn
from torch.distributed.tensor import DTensor

from raylight.cluster.errors import RunCancelled
from raylight.cluster.tensor_delta import Sender
from raylight.host.checkpoint import load_mapped
from raylight.host.pickling import serialize
from raylight.host.recipe import REPLICATED, SHARDED, FileStamp, ModelRecipe
from raylight.parallel.heartbeat import cancellation_checked_by
from raylight.parallel.mesh import MeshShape, build_mesh, world_axis
from raylight.parallel.process_group import among, any_rank, smallest
from raylight.worker import load_progress
from raylight.worker.model_cache import CachedModel, ModelCache
from raylight.worker.node_code import ModelSnapshot
from raylight.worker.patcher import mode_of
from raylight.worker.replicated_patcher import build_replicated
from raylight.worker.service import ModelService
from raylight.worker.sharded_patcher import build_sharded

CPU, GPU = torch.device("cpu"), torch.device("cpu", 0)
Sizes = tuple[float, float]

# What memory concerns of the parallelism of a model.
WITHOUT_GRAPHS: Any = SimpleNamespace(has_graphs=False, drop_graphs=lambda: None)


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


def agreed_after_loads(rank: int, world: int, path: Path) -> int:
    """What ranks agree on, their number, after each has loaded a split model on its own as often as its number says."""
    patcher = _split(path, world).patcher
    alone = [dist.new_group([one]) for one in range(world)][rank]
    with among(alone):
        for _ in range(rank):
            patcher.clone().partially_load(CPU)
    return smallest(rank)


def bytes_after_a_cancel(rank: int, world: int, path: Path) -> list[int]:
    """Bytes of a split model's shards on this rank, from before it leaves its device until it is there again; the first
    time, rank 1 is asked to cancel while they are read.
    """
    patcher = _split(path, world).patcher
    patcher.offload_device = GPU
    found = [_stored(patcher.model)]
    patcher.detach()
    found.append(_stored(patcher.model))
    run = SimpleNamespace(cancel_requested=rank == 1)

    def check() -> None:
        if any_rank(run.cancel_requested):
            raise RunCancelled

    with load_progress.for_run(run, SimpleNamespace(name="split")), cancellation_checked_by(check):
        try:
            patcher.read_released()
        except RunCancelled:
            found.append(_stored(patcher.model) + patcher.loaded_size())
        run.cancel_requested = False
        patcher.read_released()
        patcher.partially_load(CPU)
    return [*found, _stored(patcher.model)]


def gone_with_what_was_sent(rank: int, world: int, path: Path, sharding: str) -> tuple[list[bool], int]:
    """Whether a model that is dropped for want of memory is gone, each time when the memory is looked at; and how many
    tensors the rank still has of those that a single call of another one has sent, after all were released.
    """
    mesh, run = build_mesh(MeshShape(), CPU), SimpleNamespace(rank=0, enter=lambda _: None, emit=lambda _: None)
    service = ModelService(SimpleNamespace(device=CPU, world_size=world, links=None, mesh=mesh, by_run=None))
    with mode_of(sharding), load_progress.for_run(run, SimpleNamespace(name="model")):
        model = service._load(run, ModelRecipe.of(str(path), "default", sharding))
    patcher = model.patched(()).clone()
    sent = serialize(({}, {}, {}, [patcher, patcher.model.diffusion_model]), patcher, False)
    service._forward._extras_of(patcher, SimpleNamespace(extras=SimpleNamespace(key="sent", get=lambda: sent)))
    service._forward._snapshot = ModelSnapshot(patcher)
    left, found = weakref.ref(patcher.model.diffusion_model), []
    other: Any = SimpleNamespace(recipe=SimpleNamespace(without_loras="other"))
    service._models.add(other)
    del model, patcher

    def fits(_: int) -> bool:
        found.append(left() is None)
        return found[-1]

    with patch.object(service._models, "_fits_on_host", fits):
        service._models.make_room_on_host(1)
    del service._models._models["other"]
    sender = Sender("stream", 1 << 20)
    sender.slot(torch.ones(5000))
    service._forward._tensors.receive(sender.message())
    service.free(run)
    return found, len(service._forward._tensors._kept)


def _stored(model: nn.Module) -> int:
    shards = (one.to_local() for one in model.parameters() if isinstance(one, DTensor))
    return sum(shard.untyped_storage().nbytes() for shard in shards)


def _whole(path: Path) -> CachedModel:
    with mode_of(REPLICATED):
        mapped = load_mapped(str(path), {})
        patcher, own_bytes = build_replicated(mapped, CPU, in_file=True)
        patcher.load_device = GPU
        comfy.model_management.load_models_gpu([patcher])
    return CachedModel(ModelRecipe("whole", "default", FileStamp(1)), patcher, WITHOUT_GRAPHS, {}, {}, own_bytes)


def _split(path: Path, world: int) -> CachedModel:
    with mode_of(SHARDED):
        mesh = world_axis(build_mesh(MeshShape(ulysses=world), CPU))
        patcher, report = build_sharded(load_mapped(str(path), {}), mesh, offload=False)
    return CachedModel(
        ModelRecipe("split", "default", FileStamp(1), SHARDED), patcher, WITHOUT_GRAPHS, {}, {}, report.bytes
    )
