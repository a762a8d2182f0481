"""What a worker does: hold models, split them, and run samplers on them."""

from __future__ import annotations

import gc
import logging

import comfy.model_management
import torch
from comfy.model_base import BaseModel
from torch import Tensor

from raylight.attention.kernels import kernel
from raylight.cluster.actor import RankContext, Run
from raylight.parallel.attention import SequenceAttention, Strategy
from raylight.parallel.hooks import SequenceHooks
from raylight.parallel.long_context import OURS, LongContextAttention
from raylight.parallel.mesh import sequence_axis, world_axis
from raylight.parallel.ring import HybridAttention
from raylight.parallel.tokens import TokenState
from raylight.parallel.whole import WholeTokens
from raylight.plans import plan_for

from . import attention_door, attention_hook, model, patch_hook, sampling
from .job import SampleJob
from .mapped import MappedModel
from .model import ModelInfo
from .patcher import RankPatcher, whole
from .recipe import OFFLOADED, WHOLE, ModelRecipe
from .sharded import shard_over

logger = logging.getLogger(__name__)


class ModelService:
    """The models of one rank. Every method is called on all ranks alike."""

    def __init__(self, context: RankContext) -> None:
        self._context = context
        self._recipe: ModelRecipe | None = None
        self._patcher: RankPatcher | None = None
        self._info: ModelInfo | None = None
        self._tokens: TokenState | None = None

    def load(self, run: Run, recipe: ModelRecipe) -> ModelInfo:
        """Hold the model of `recipe`, split over the ranks; does nothing when it is held already.

        Raises ValueError for a file that is no such model, a model without a plan, or too few heads. The
        model held before is gone then, and the session stays usable.
        """
        if self._recipe != recipe or self._patcher is None:
            self._unload()
            self._patcher = self._place(recipe)
            self._recipe = recipe
            logger.info("rank %d holds %s", run.rank, recipe.name)
        return self._info

    def sample(self, run: Run, job: SampleJob) -> Tensor | None:
        """Run a sampler; rank 0 returns the latent (B, C, [T,] H, W) on the CPU, the others None.

        Emits `StepDone` after every step, and can be cancelled there.
        """
        self.load(run, job.recipe)
        patcher = self._patcher.clone()
        if self._tokens is not None:
            attention = SequenceAttention(self._tokens, self._strategy(job.strategy),
                                          sequence_axis(self._context.mesh).get_group())
            attention_hook.install(patcher.model_options, attention, kernel(job.attention, self._context.device))
        samples = sampling.sample(run, patcher, job)
        if job.free_memory_after:
            self._free_memory()
        return samples if run.rank == 0 else None

    def _place(self, recipe: ModelRecipe) -> RankPatcher:
        # ComfyUI's quantised tensors can only be used in the mode that they were made in.
        with torch.inference_mode(recipe.sharding == WHOLE):
            mapped = model.map_file(recipe)
            return self._hold(recipe, mapped)

    def _hold(self, recipe: ModelRecipe, mapped: MappedModel) -> RankPatcher:
        # Before weights are split: FSDP changes the class by which a plan is found.
        self._split(recipe, mapped.model)
        with model.errors_of(recipe):
            if recipe.sharding == WHOLE:
                return whole(mapped, comfy.model_management.unet_offload_device())
            patcher, _ = shard_over(mapped, world_axis(self._context.mesh), recipe.sharding == OFFLOADED)
            return patcher

    def _split(self, recipe: ModelRecipe, base: BaseModel) -> None:
        self._info = model.info(recipe, base)
        mesh = self._context.mesh
        sequence = sequence_axis(mesh)
        if sequence.size() == 1:
            return
        diffusion_model = base.diffusion_model
        tokens = TokenState(sequence.get_local_rank(), sequence.size())
        plan = plan_for(diffusion_model, type(base.model_config).__name__)
        SequenceHooks(diffusion_model, plan, tokens, sequence.get_group(), mesh["ulysses"].size())
        attention_door.open_for(diffusion_model, plan.unhooked)
        patch_hook.install(diffusion_model, plan, WholeTokens(tokens, sequence.get_group()))
        self._tokens = tokens

    def _strategy(self, name: str) -> Strategy:
        """What exchanges tokens around attention. Raises ValueError where its library does not work here."""
        ulysses, ring = (self._context.mesh.get_group(axis) for axis in ("ulysses", "ring"))
        ours = HybridAttention(ulysses, ring)
        if name == OURS:
            return ours
        try:
            return LongContextAttention(name, ulysses, ring, ours)
        except ImportError as error:
            raise ValueError(f"sequence_attention = {name} cannot be used: {error}; choose {OURS}") from error

    def _unload(self) -> None:
        self._recipe = self._patcher = self._info = self._tokens = None
        gc.collect()  # hooks, and FSDP's states, refer to the modules that hold them
        self._free_memory()

    @staticmethod
    def _free_memory() -> None:
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
