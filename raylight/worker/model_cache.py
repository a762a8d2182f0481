"""The models that a rank holds in memory, by recipe."""

from __future__ import annotations

import gc
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from raylight.cluster.object_store import ObjectHandle
from raylight.host.jobs import NeedsBytes
from raylight.host.log_messages import gb, warn_on_first_rank
from raylight.host.machine_memory import available_memory, total_memory
from raylight.host.pickling import deserialize
from raylight.host.recipe import OFFLOADED, REPLICATED, SHARDED, LoraRecipe, ModelRecipe
from raylight.parallel import memory_shares
from raylight.parallel.process_group import any_rank, smallest
from raylight.sharding import staged_read

from . import cuda_graphs, lora
from .lora import WeightShapes
from .parallel_model import ParallelModel
from .patcher import RankPatcher

logger = logging.getLogger(__name__)

_HOST_RESERVE = 0.1  # of the machine's or container's memory is not for models that are not in use


@dataclass(slots=True)
class CachedModel:
    """A model on this rank, and a patcher with the LoRAs and patches of its last use.

    `lora_keys` and `shapes` are as in `MappedModel`. `host_bytes` is this rank's own memory for weights that are not on
    the GPU: none if the mapped file has them all.
    """

    recipe: ModelRecipe
    patcher: RankPatcher
    parallel: ParallelModel
    lora_keys: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    host_bytes: int
    _applied: tuple[tuple[LoraRecipe, ...], str | None] = ((), None)
    _patched: RankPatcher | None = field(default=None)
    sampled: tuple[tuple[int, ...], ...] = ()  # shapes of the latents of its last job

    def patched(self, loras: tuple[LoraRecipe, ...], patches: ObjectHandle | None = None) -> RankPatcher:
        """Return the patcher with these LoRAs, then these patches, and no others.

        The same object for the same ones, whose weights ComfyUI then leaves as they are.

        Raises ValueError: for a LoRA that does not fit.
        """
        wanted = loras, None if patches is None else patches.key
        if self._patched is None or wanted != self._applied:
            self._patched = self.patcher if wanted == ((), None) else self._with(loras, patches)
            self._applied = wanted
        return self._patched

    def _with(self, loras: tuple[LoraRecipe, ...], patches: ObjectHandle | None) -> RankPatcher:
        patcher = self.patcher.clone()
        shapes, warnings = WeightShapes(self.shapes), []
        for one in loras:
            fitted = lora.read_lora(one, self.lora_keys, shapes)
            patcher.add_patches(fitted.patches, one.strength)
            if loras != self._applied[0]:  # otherwise logged when these were applied
                warnings += fitted.warnings
        if patches is not None:
            written, received = deserialize(patches.get(), patcher, copies=False)
            on_weights, more = lora.fit_weight_patches(
                {key: of_weight for key, of_weight in received.items() if key in self.shapes}, shapes
            )
            for key, of_weight in on_weights.items():
                patcher.patches[key] = [*patcher.patches.get(key, []), *of_weight]
            for key, weight in written.items():  # the weight itself, before any LoRA
                patcher.patches[key] = [(1.0, ("set", (weight,)), 1.0, None, None), *patcher.patches.get(key, [])]
            patcher.patches_uuid = uuid.uuid4()
            warnings += more
        warn_on_first_rank(logger, warnings, self.recipe.name)
        return patcher


class ModelCache:
    """Models by recipe, the least recently used first. All ranks call the same methods in the same order."""

    def __init__(
        self, device: torch.device, world_size: int, on_drop: Callable[[CachedModel], None] = lambda _: None
    ) -> None:
        """`on_drop` is called with a model that is about to be dropped: who keeps some of it must release that."""
        self._device, self._on_drop = device, on_drop
        self._world_size = world_size
        self._models: dict[ModelRecipe, CachedModel] = {}

    def get(self, recipe: ModelRecipe) -> CachedModel | None:
        """Return the model of a recipe without its LoRAs, as the most recently used one; None if it is not held."""
        found = self._models.pop(recipe.without_loras, None)
        if found is not None:
            self._models[recipe.without_loras] = found
        else:
            self._drop_gone()
        return found

    def holds(self, recipe: ModelRecipe) -> bool:
        """Return whether the model of a recipe is held, with whatever LoRAs."""
        return recipe.without_loras in self._models

    def add(self, model: CachedModel) -> None:
        """Hold a model, as the most recently used one."""
        self._models[model.recipe.without_loras] = model

    def all(self) -> tuple[CachedModel, ...]:
        """Return the models, the least recently used first."""
        return tuple(self._models.values())

    def make_room_on_host(self, needed: int) -> None:
        """Drop models, the least recently used first, until each rank has room for `needed` bytes. Collective."""
        while self._models and not self._fits_on_host(needed):
            self._drop_for_want_of_memory(next(iter(self._models.values())))

    def needed(self, recipe: ModelRecipe, latent_shapes: Sequence[tuple[int, ...]] = ()) -> int:
        """Return how many bytes of this rank's GPU have to be free to load what is missing of a model, and to sample
        one latent at a time of these shapes.
        """
        needed = comfy.model_management.minimum_inference_memory()
        found = self._models.get(recipe.without_loras)
        if found is None:
            part = memory_shares.own_part(recipe.size, self._world_size)
            needed += {REPLICATED: recipe.size, SHARDED: part, OFFLOADED: 0}[recipe.sharding]
        else:
            needed += found.patcher.model_size() - found.patcher.loaded_size()
            needed += max((found.patcher.model.memory_required(list(shape)) for shape in latent_shapes), default=0)
        return int(needed)

    def refusal(self, recipe: ModelRecipe, latent_shapes: Sequence[tuple[int, ...]] = ()) -> NeedsBytes | None:
        """Return what this rank's GPU lacks for a model, as `needed`; None if no GPU lacks anything. Collective."""
        if self._device.type == "cpu":
            return None
        missing = self._lacking_without_graphs(recipe, latent_shapes)
        if not any_rank(missing > 0):
            return None
        if self.release_kept():
            missing = self._lacking(recipe, latent_shapes)
            if not any_rank(missing > 0):
                return None
        movable = sum(other.patcher.loaded_size() for other in self._others(recipe))
        return NeedsBytes(max(0, missing), movable)

    def make_room_on_device(self, recipe: ModelRecipe, latent_shapes: Sequence[tuple[int, ...]] = ()) -> None:
        """Move weights of other models to the CPU, those of the least recently used first, until each rank has `needed`
        bytes free. Collective.
        """
        if self._device.type == "cuda":
            self._lacking_without_graphs(recipe, latent_shapes)
            if (used := self._models.get(recipe.without_loras)) is not None and latent_shapes:
                used.sampled = tuple(map(tuple, latent_shapes))
            self._move_away(self._others(recipe), lambda: self._lacking(recipe, latent_shapes))

    @property
    def _gathers_any(self) -> bool:
        """Whether there is a model whose weights are gathered, the same on all ranks."""
        return any(model.recipe.sharding != REPLICATED for model in self.all())

    def release_kept(self) -> bool:
        """Drop the gathered weights of all models. Return whether there may have been any, the same on all ranks: each
        calls this.
        """
        freed = sum(model.patcher.release_kept() for model in self.all())
        if freed:
            logger.info("%s of gathered weights are dropped to make room", gb(freed))
        return self._gathers_any

    def leave_room(self, beside_comfyui: bool) -> None:
        """Drop gathered weights if less than `least_free` is left on a GPU that ComfyUI uses too, for what does not ask
        for it. `beside_comfyui` tells whether this rank's is one. Collective.
        """
        if self._device.type == "cpu" or not self._gathers_any:
            return
        keeps = beside_comfyui and any(model.patcher.kept_bytes for model in self.all())
        if any_rank(keeps and torch.cuda.mem_get_info(self._device)[0] < cuda_graphs.least_free(self._device)):
            self.release_kept()
            if beside_comfyui:
                self.free_unused()

    def give_back(self, wanted: int | None) -> int:
        """Give back to other programs what is not in use of this rank's GPU, and move weights to the CPU, those of the
        least recently used model first, until that is `wanted` bytes. That may differ by rank; None for a rank that is
        not asked. Return how many bytes that was. Collective.
        """
        if self._device.type == "cpu":
            return 0
        before = torch.cuda.memory_reserved(self._device)

        def freed() -> int:
            if wanted is not None:
                self.free_unused()
                if wanted > before - torch.cuda.memory_reserved(self._device):
                    cuda_graphs.release(self._device)
            return before - torch.cuda.memory_reserved(self._device)

        self._move_away(self.all(), lambda: 0 if wanted is None else wanted - freed())
        return freed()

    def _lacking(self, recipe: ModelRecipe, latent_shapes: Sequence[tuple[int, ...]]) -> int:
        """Return how many bytes this rank's GPU lacks; less than 0 where some are left."""
        free: Any = comfy.model_management.get_free_memory(self._device)
        # To ComfyUI what graphs keep to themselves is PyTorch's to use. It is, by replays of the same sizes. And what
        # is kept gathered leaves the room that forwards of these sizes were measured to take.
        used = self._models.get(recipe.without_loras)
        if used is not None and used.sampled != tuple(map(tuple, latent_shapes)):
            used = None
        held = 0 if used is not None and used.parallel.has_graphs else cuda_graphs.held_bytes(self._device)
        kept = 0 if used is None else used.patcher.kept_bytes
        return self.needed(recipe, latent_shapes) - int(free) + held - kept

    def _lacking_without_graphs(self, recipe: ModelRecipe, latent_shapes: Sequence[tuple[int, ...]]) -> int:
        """Return as `_lacking`, after dropping all graphs of this rank if their memory is needed."""
        missing = self._lacking(recipe, latent_shapes)
        if missing > 0 and cuda_graphs.release(self._device):
            logger.info("CUDA graphs are dropped to make room")
            missing = self._lacking(recipe, latent_shapes)
        return missing

    def _others(self, recipe: ModelRecipe) -> list[CachedModel]:
        used = self._models.get(recipe.without_loras)
        return [model for model in self.all() if model is not used]

    def _move_away(self, models: Sequence[CachedModel], lacking: Callable[[], int]) -> None:
        """Move weights of models to the CPU, in this order, until no rank is lacking bytes. The gathered weights of
        all models go first. Collective.
        """
        if self._gathers_any:
            if not any_rank(lacking() > 0):
                return
            self.release_kept()
        for model in models:
            missing = lacking()
            if not any_rank(missing > 0):
                return
            if model.recipe.sharding == REPLICATED:
                self._move_in_part(model, missing, lacking)
            elif not any_rank(model.patcher.loaded_size() > 0):
                continue
            elif model.recipe.sharding == SHARDED and not self._fits_on_host(model.host_bytes):
                self._drop_for_want_of_memory(model)
            else:
                logger.info("%s is moved to the CPU to make room", model.recipe.name)
                self._forget_as_loaded(model)
                model.patcher.detach()

    def _move_in_part(self, model: CachedModel, missing: int, lacking: Callable[[], int]) -> None:
        """Move as much of a replicated model to the CPU as this rank is lacking, whatever other ranks do: the weights
        are in the file, and come back with the next use.
        """
        before = left = model.patcher.loaded_size()
        while missing > 0 and left > 0:
            patcher = self._loaded_patcher(model)
            if missing < left and patcher is not None:
                patcher.partially_unload(patcher.offload_device, missing)
            if model.patcher.loaded_size() >= left:  # asked for all, or of its parts none can leave alone
                self._forget_as_loaded(model)
                (patcher or model.patcher).detach()
            left, missing = model.patcher.loaded_size(), lacking()
        if left < before:
            moved, of = gb(before - left), gb(before)
            logger.info("%s of %s of %s are moved to the CPU to make room", moved, of, model.recipe.name)

    @staticmethod
    def _loaded_patcher(model: CachedModel) -> ModelPatcher | None:
        """Return the patcher whose LoRAs and patches the weights on the device have. None if it is not known, after a
        cancel while they were read: the model can then leave as a whole only.
        """
        loaded = (one.model for one in comfy.model_management.current_loaded_models)
        return next((one for one in loaded if one is not None and one.is_clone(model.patcher)), None)

    def drop(self, model: CachedModel) -> None:
        """Release a model and its memory."""
        del self._models[model.recipe.without_loras]
        self._on_drop(model)
        self._forget_as_loaded(model)  # to unload it would first make a copy on the CPU
        del model.patcher, model._patched, model.parallel  # the caller still has `model`
        self.sweep()

    @staticmethod
    def sweep() -> None:
        """Free the memory of released objects."""
        gc.collect()  # hooks, also those that gather weights, refer to the modules that hold them
        comfy.model_management.soft_empty_cache()

    @staticmethod
    def free_unused() -> None:
        """Give GPU memory that no tensor uses, and ComfyUI's buffers for weights in system memory, to other programs,
        which see it as taken until then.
        """
        comfy.model_management.reset_cast_buffers()

    def clear(self) -> None:
        """Release all models."""
        for model in self.all():
            self.drop(model)
        staged_read.release()

    def unload_from_device(self) -> None:
        """Move the weights of all models to the CPU, and give the device's memory back to other programs."""
        comfy.model_management.unload_all_models()
        self.release_kept()
        cuda_graphs.release(self._device)  # of weights that have left the GPU
        comfy.model_management.soft_empty_cache()

    @staticmethod
    def _forget_as_loaded(model: CachedModel) -> None:
        # Not every model is in ComfyUI's list: shards are on the GPU before they are sampled for the first time.
        loaded = comfy.model_management.current_loaded_models
        loaded[:] = [one for one in loaded if one.model is None or not one.model.is_clone(model.patcher)]
        model.parallel.drop_graphs()  # of weights that leave the GPU

    def _fits_on_host(self, needed: int) -> bool:
        if needed == 0:  # however full the machine is
            return True
        # Of this rank's machine or container; the others may have more, or less.
        spare = available_memory() - int(_HOST_RESERVE * total_memory())
        return smallest(spare - needed * self._world_size) >= 0

    def _drop_gone(self) -> None:
        """Drop models whose weights were in ComfyUI's memory and no longer are, which frees it. Collective."""
        for model in self.all():
            if model.recipe.export is not None and smallest(int(model.recipe.is_there)) == 0:
                self.drop(model)

    def _drop_for_want_of_memory(self, model: CachedModel) -> None:
        logger.info("%s is dropped: memory is short", model.recipe.name)
        self.drop(model)
