"""Split weights that a run in inference mode moves and patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from comfy.cli_args import args

args.cpu = not torch.cuda.is_available()  # before ComfyUI picks a device

from loras import lora_for
from torch.distributed.tensor import DTensor

from raylight.host.checkpoint import MappedModel, load_mapped
from raylight.host.recipe import SHARDED
from raylight.parallel.mesh import MeshShape, build_mesh, world_axis
from raylight.worker import lora
from raylight.worker.patcher import mode_of
from raylight.worker.sharded_patcher import ShardedPatcher, build_sharded

CPU, META = torch.device("cpu"), torch.device("meta")


def moved_in_inference_mode(rank: int, world: int, path: Path) -> list[int]:
    """For shards that move and those that stay: how many weights are of inference mode after they were patched and
    moved by a run in it.
    """
    mesh = world_axis(build_mesh(MeshShape(), CPU))
    found = []
    for offload in (False, True):
        with mode_of(SHARDED):
            mapped = load_mapped(str(path), {})
            patcher, _ = build_sharded(mapped, mesh, offload)
        _take_turns(patcher)
        patcher = patcher.clone()
        patcher.add_patches(patches_for(mapped), 0.8)
        patcher.offload_device = META
        with torch.inference_mode():
            patcher.partially_load(CPU)
            patcher.detach()
        weights = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in mapped.model.parameters()]
        found.append(sum(weight.is_inference() for weight in weights))
    return found


def _take_turns(patcher: ShardedPatcher) -> None:
    """Objects that one clone puts into the model are not there for the next."""
    before = patcher.model.model_sampling
    other = patcher.clone()
    other.add_object_patch("model_sampling", torch.nn.Identity())
    for one, there in ((other, other.object_patches["model_sampling"]), (patcher.clone(), before)):
        one.partially_load(CPU)
        assert patcher.model.model_sampling is there


def patches_for(mapped: MappedModel) -> dict[Any, Any]:
    kinds = lora_for(
        {f"diffusion_model.{name.removeprefix('diffusion_model.')}": shape for name, shape in mapped.shapes.items()},
        ["lora", "lokr"],
        1,
    )
    return lora.fit_lora("lora", kinds, mapped.lora_keys, lora.WeightShapes(mapped.shapes)).patches
