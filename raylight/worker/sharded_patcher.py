"""A model whose weights are split over the ranks, behind ComfyUI's patcher."""

from __future__ import annotations

import logging

import comfy.model_management
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from raylight.host.checkpoint import MappedModel
from raylight.host.recipe import SHARDED
from raylight.sharding.assign import set_parameter
from raylight.sharding.fsdp import ShardReport, move, shard
from raylight.sharding.subclass_weights import flatten, flattened

from .patcher import RankPatcher, in_own_mode
from .sharded_patches import ShardPatches

logger = logging.getLogger(__name__)

# What ComfyUI calls of a diffusion model outside of its forward (LTX-2, Anima, MiniMax).
METHODS = ("preprocess_text_embeds",)


class ShardedPatcher(RankPatcher):
    """A patcher of shards: they are on the device or not, but never in part.

    Patches stay in the shards when they leave the device; they change when a clone with others is loaded. Loading is
    collective then.
    """

    sharding = SHARDED

    @in_own_mode
    def partially_load(self, device_to: torch.device, extra_memory: int = 0, force_patch_weights: bool = False) -> int:
        """Move the shards to the device and patch them; returns the bytes that came to it."""
        before = self.model.model_loaded_weight_memory
        with self.use_ejected(skip_and_inject_on_exit_only=True):
            self.unpatch_model(unpatch_weights=False)  # of what the clone before has put there
            self.patch_model(load_weights=False)
            self.load(device_to)
        return self.model.model_loaded_weight_memory - before

    @in_own_mode
    def load(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: int = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        """Move the shards to the device and patch them. Raises ValueError for a patch that they cannot have."""
        move(self.model, device_to, self.model.shards_stay_on_cpu)
        self.model.device = device_to
        self.model.model_lowvram = False
        self.model.model_loaded_weight_memory = self.model_size()
        self.model.shard_patches.apply(self.patches, self.patches_uuid)
        self.model.current_weight_patches_uuid = self.patches_uuid

    @in_own_mode
    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        """Move the shards away, as they are; take back what is patched besides weights."""
        super().unpatch_model(None, unpatch_weights=False)
        if unpatch_weights:
            self.unpatch_hooks()
            if device_to is not None:
                move(self.model, device_to, self.model.shards_stay_on_cpu)
                self.model.device = device_to
            self.model.model_loaded_weight_memory = 0
            self.model.current_weight_patches_uuid = None

    def partially_unload(
        self, device_to: torch.device, memory_to_free: int = 0, force_patch_weights: bool = False
    ) -> int:
        """Nothing: a rank alone cannot give up part of what the others gather from it."""
        return 0


def build_sharded(mapped: MappedModel, mesh: DeviceMesh, offload: bool) -> tuple[ShardedPatcher, ShardReport]:
    """Split a mapped model over a one-dimensional mesh; each rank reads its own rows. Collective.

    Returns the patcher of this rank's part, and what became of the weights.

    Raises ValueError, naming the tensor, where one has not the shape that the model wants.
    """
    model = mapped.model
    weights = _on_meta(mapped)
    report = shard(model.diffusion_model, weights, mesh, mapped.load_device, offload, METHODS)
    model.shards_stay_on_cpu = offload
    model.shard_patches = ShardPatches(model.diffusion_model, mesh, mapped.load_device, _patch_dtype(mapped))
    _tell(report, mesh)
    # The same size on every rank, though rows may be uneven: ranks decide alike by it.
    part = 0 if offload else -(-(report.whole_bytes - report.replicated_bytes) // mesh.size())
    size = report.replicated_bytes + part
    patcher = ShardedPatcher(model, mapped.load_device, comfy.model_management.unet_offload_device(), size=size)
    patcher.load(mapped.load_device)  # the shards are there already: ComfyUI need not make room for them
    return patcher, report


def _on_meta(mapped: MappedModel) -> dict[str, Tensor]:
    """Take the weights out of a model and leave parameters on `meta`, of the dtypes that they are to have."""
    diffusion_model = mapped.model.diffusion_model
    flatten(diffusion_model, flattened if mapped.ggml is None else mapped.ggml.unpack)
    weights = {name: parameter.detach() for name, parameter in diffusion_model.named_parameters()}
    for name, weight in weights.items():
        dtype = mapped.dtypes.get(name, weight.dtype)
        set_parameter(diffusion_model, name, torch.empty(weight.shape, dtype=dtype, device="meta"))
    return weights


def _patch_dtype(mapped: MappedModel) -> torch.dtype:
    """What patches are computed in: as ComfyUI does, or with GGUF files as ComfyUI-GGUF does."""
    if mapped.ggml is not None:
        return torch.float32
    return comfy.model_management.lora_compute_dtype(mapped.load_device)


def _tell(report: ShardReport, mesh: DeviceMesh) -> None:
    if mesh.get_local_rank() == 0:
        logger.info(
            "%.2f of %.2f GB of weights on each of %d ranks, in %d parts that are gathered one by one",
            report.bytes / 1e9,
            report.whole_bytes / 1e9,
            mesh.size(),
            report.units,
        )
