"""ComfyUI's patcher of a model whose weights are sharded over the ranks."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass

import comfy.model_management
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from raylight.cluster.errors import RunCancelled
from raylight.host.checkpoint import MappedModel
from raylight.host.jobs import METHODS
from raylight.host.log_messages import gb
from raylight.host.recipe import SHARDED
from raylight.parallel import memory_shares
from raylight.parallel.heartbeat import cancellation_point
from raylight.parallel.process_group import any_rank_of_each, of_all_ranks
from raylight.sharding.assign import set_parameter
from raylight.sharding.fsdp import ShardReport, gathering_of, move, shard
from raylight.sharding.rows import RowSplit
from raylight.sharding.shards import Shards, own_rows
from raylight.sharding.subclass_weights import flatten_tensor, flatten_weights

from . import load_progress
from .kept_units import KeptUnits
from .load_progress import ReadingStopped
from .patcher import RankPatcher, in_own_mode
from .sharded_patches import ShardPatches
from .spare_memory import spare_memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ShardedWeights:
    """A model's shards, the patches on them, what is kept gathered, the group of all ranks, and whether shards stay in
    host memory.
    """

    shards: Shards
    patches: ShardPatches
    kept: KeptUnits
    group: dist.ProcessGroup
    offloaded: bool


class ShardedPatcher(RankPatcher):
    """A patcher of shards: either all of them are on the device, or none.

    When they leave the device, only the file has them. They change when a clone with other patches is loaded; loading
    is collective then.
    """

    sharding = SHARDED
    weights: ShardedWeights

    @in_own_mode
    def partially_load(self, device_to: torch.device, extra_memory: int = 0, force_patch_weights: bool = False) -> int:
        """Move the shards to the device and patch them; return how many bytes that added there. Collective.

        Raises as `load`.
        """
        before = self.model.model_loaded_weight_memory
        with self.use_ejected(skip_and_inject_on_exit_only=True):
            self.unpatch_model(unpatch_weights=False)  # objects of the clone that was loaded before
            self.patch_model(load_weights=False)
            try:
                self.load(device_to)
            except RunCancelled:
                self.detach()  # what was read, or patched, in part: nothing accounts for it
                raise
        return self.model.model_loaded_weight_memory - before

    @in_own_mode
    def load(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: int = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        """Bring the shards to the device and patch them. Collective if they have other patches.

        Raises ValueError: for a patch that sharded weights cannot have.
        """
        if device_to is not None:
            self.weights.shards.read()  # none, unless they have left the device since `read_released`
            move(self.model, device_to)
        self.model.device = device_to
        self.model.model_lowvram = False
        self.model.model_loaded_weight_memory = self.model_size()
        self.weights.patches.apply(self.patches, self.patches_uuid)
        self.model.current_weight_patches_uuid = self.patches_uuid

    @in_own_mode
    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        """Restore objects and hooks; give the memory of the shards back, without their patches."""
        super().unpatch_model(None, unpatch_weights=False)
        if unpatch_weights:
            self.unpatch_hooks()
            if device_to is not None:
                if device_to != self.load_device:
                    self.release_kept()
                    if not self.weights.offloaded:
                        self.weights.shards.release()
                        self.weights.patches.revert()
                move(self.model, device_to)
                self.model.device = device_to
            self.model.model_loaded_weight_memory = 0
            self.model.current_weight_patches_uuid = None

    @property
    def kept_bytes(self) -> int:
        return self.weights.kept.bytes

    def release_kept(self) -> int:
        return self.weights.kept.release()

    def partially_unload(
        self, device_to: torch.device, memory_to_free: int = 0, force_patch_weights: bool = False
    ) -> int:
        """Return 0: a rank alone cannot unload shards that the others gather from it."""
        return 0

    @in_own_mode
    def read_released(self) -> None:
        """Read shards that have left the device, on whichever ranks they have, and keep nothing that was gathered if a
        rank has lost it; before a run, in which not all ranks load as often, and METHODS may gather before a forward.
        Collective.

        Raises RunCancelled: if a rank was asked to cancel.
        """
        weights = self.weights
        released, lost = any_rank_of_each([weights.shards.released, weights.kept.has_lost], weights.group)
        if lost:
            weights.kept.keep_none()
        if not released:
            return
        weights.patches.revert()  # on the other ranks too: to patch them again is collective
        with load_progress.reported(lambda: weights.shards.bytes_to_read, may_stop=True), suppress(ReadingStopped):
            weights.shards.read()
        try:
            cancellation_point()
        except RunCancelled:
            self.detach()  # what was read in part: nothing accounts for it
            raise


def build_sharded(mapped: MappedModel, mesh: DeviceMesh, offload: bool) -> tuple[ShardedPatcher, ShardReport]:
    """Shard a mapped model over a one-dimensional mesh; each rank reads its own rows of each weight. Collective.

    Raises ValueError: when a tensor has not the shape that the model needs; the message names it.
    """
    model = mapped.model
    weights = _take_weights(mapped)
    nbytes = sum(parameter.nbytes for parameter in model.diffusion_model.parameters())
    # System memory is not shared by memory: on one machine all ranks have the same.
    split = RowSplit.over(mesh, () if offload else memory_shares.shares_of(nbytes, memory_shares.in_use()))
    report = shard(model.diffusion_model, weights, mesh, mapped.load_device, offload, METHODS, split)
    held = [report.bytes] if split.is_even else of_all_ranks(report.bytes)
    if mesh.get_local_rank() == 0:
        logger.info(
            "%s of %s of weights on %s, gathered in %d units",
            ", ".join(map(gb, held)),
            gb(report.model_bytes),
            f"each of {mesh.size()} ranks" if split.is_even else "the ranks, by their memory",
            report.units,
        )
    # The same size on every rank whose shards are about as large: ranks decide alike by it.
    in_shards = report.model_bytes - report.replicated_bytes
    shard_bytes = -(-in_shards // mesh.size()) if split.is_even else report.sharded_bytes
    size = report.replicated_bytes + (0 if offload else shard_bytes)
    patcher = ShardedPatcher(model, mapped.load_device, comfy.model_management.unet_offload_device(), size=size)
    name, gathering = type(model.diffusion_model).__name__, gathering_of(model.diffusion_model)
    kept = KeptUnits(name, gathering, mesh.get_group(), spare_memory(mapped.load_device))
    patches = ShardPatches(model.diffusion_model, mesh, split, mapped.load_device, _patch_dtype(mapped), kept.forget)
    # Shards that stay in system memory need the file no more.
    shards = Shards(model.diffusion_model, {} if offload else own_rows(model.diffusion_model, weights, split))
    patcher.weights = ShardedWeights(shards, patches, kept, mesh.get_group(), offload)
    patcher.load(mapped.load_device)  # the shards are there already: ComfyUI need not make room for them
    return patcher, report


def _take_weights(mapped: MappedModel) -> dict[str, Tensor]:
    """Return the weights by name, as the file has them, and leave parameters of their final dtypes on `meta`."""
    diffusion_model = mapped.model.diffusion_model
    flatten_weights(diffusion_model, flatten_tensor if mapped.ggml is None else mapped.ggml.flatten)
    weights = {name: parameter.detach() for name, parameter in diffusion_model.named_parameters()}
    for name, weight in weights.items():
        dtype = mapped.dtypes.get(name, weight.dtype)
        set_parameter(diffusion_model, name, torch.empty(weight.shape, dtype=dtype, device="meta"))
    return weights


def _patch_dtype(mapped: MappedModel) -> torch.dtype:
    """Return the dtype in which patches are computed: ComfyUI's, or for GGUF files that of ComfyUI-GGUF."""
    if mapped.ggml is not None:
        return torch.float32
    return comfy.model_management.lora_compute_dtype(mapped.load_device)
