"""The recipe by which a model file becomes a parallel model on the ranks: order matters, and is kept here."""

from __future__ import annotations

import comfy.model_management
import torch
from torch.distributed.device_mesh import DeviceMesh

from raylight.host import loading
from raylight.host.recipe import OFFLOADED, REPLICATED, ModelRecipe
from raylight.parallel.degrees import DegreesByRun
from raylight.parallel.mesh import world_axis

from .model_cache import CachedModel
from .parallel_model import ParallelModel
from .replicated_patcher import build_replicated
from .sharded_patcher import build_sharded


def load_parallel(
    recipe: ModelRecipe, mesh: DeviceMesh, device: torch.device, by_run: DegreesByRun | None = None
) -> CachedModel:
    """Load the model of a recipe without its LoRAs, parallel over the ranks of `mesh`, or on meshes of the same ranks
    that `by_run` chooses. Collective.

    To be called in `mode_of(recipe.sharding)`.

    Raises ValueError: for a file that is no such model, and for a model with too few heads for its plan.
    """
    # First the model as ComfyUI builds it, with weights still in the file: no rank ever holds more than it keeps.
    mapped = loading.map_file(recipe)
    # Sequence-parallel hooks before weights: a refusal costs nothing as long as no weight was read.
    parallel = ParallelModel(mapped.model, mesh, device, by_run)
    # Weights: read from the file only now, by rows where they are sharded.
    with loading.file_errors(recipe):
        if recipe.sharding == REPLICATED:
            patcher, host_bytes = build_replicated(mapped, comfy.model_management.unet_offload_device())
        else:
            patcher, report = build_sharded(mapped, world_axis(mesh), recipe.sharding == OFFLOADED)
            host_bytes = report.host_bytes
    # The batch hook last, so that it runs before all others: it decides which group of ranks they work for.
    parallel.finalize_hooks()
    return CachedModel(recipe, patcher, parallel, mapped.lora_keys, mapped.shapes, host_bytes)
