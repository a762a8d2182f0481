"""What a worker does: hold models, split them, and run samplers on them."""

from __future__ import annotations

import logging

import comfy.model_management

from raylight.cluster.actor import RankContext, Run
from raylight.cluster.serialization import SerializedObject
from raylight.host.jobs import ForwardJob, ModelJob, NeedsBytes, RankMemory, RunJob, RunResult
from raylight.host.recipe import REPLICATED, SHARDED, ModelRecipe
from raylight.host.worker_service import WorkerService
from raylight.parallel.mesh import sequence_axis
from raylight.sharding.fsdp import reset

from . import model_cache
from .model_cache import CachedModel, ModelCache
from .model_forward import ModelForward, answer
from .parallelize import load_parallel
from .patcher import RankPatcher, mode_of
from .sampling import SamplingRun

logger = logging.getLogger(__name__)


class ModelService(WorkerService):
    """The models of one rank. Its verbs are documented in `WorkerService`."""

    def __init__(self, context: RankContext) -> None:
        self._context = context
        self._models = ModelCache(context.device, context.world_size)
        self._forward = ModelForward(context.device)

    def load(self, run: Run, recipe: ModelRecipe, may_refuse: bool = False) -> NeedsBytes | None:
        """Load a model with its LoRAs."""
        if may_refuse and (refusal := self._refusal(recipe)):
            return refusal
        with mode_of(recipe.sharding):
            held = self._hold(run, recipe)
            run.enter("reading LoRAs")
            held.patched(recipe.loras)
        return None

    def sample(self, run: Run, jobs: tuple[RunJob, ...], may_refuse: bool = False) -> dict[int, RunResult] | NeedsBytes:
        """Do complete runs of one model."""
        first = jobs[0]
        if may_refuse and (refusal := self._refusal(first.model.recipe, *[job.latent_shape for job in jobs])):
            return refusal
        self._forward.clear()  # a run may find nothing on the model of what the loops in ComfyUI have left
        with mode_of(first.model.recipe.sharding):
            self._forward.clear()
            held, patcher = self._ready(run, first.model)
            results = self._all(run, held, patcher, jobs)
            run.enter("handing over the result")
            if first.free_memory_after:
                comfy.model_management.unload_all_models()
                comfy.model_management.soft_empty_cache()
        return results if sequence_axis(self._context.mesh).get_local_rank() == 0 else {}

    def _all(self, run: Run, held: CachedModel, patcher: RankPatcher, jobs: tuple[RunJob, ...]) -> dict[int, RunResult]:
        if len(jobs) == 1:
            return {0: self._one(run, held, patcher, 0, jobs[0])}
        batch = self._context.mesh["batch"]
        mine = list(range(batch.get_local_rank(), len(jobs), batch.size()))
        with held.split.independent_groups(in_step=held.recipe.sharding != REPLICATED):
            # A group without a run of its own does the first one too: what it does not do, it would wait for.
            return {place: self._one(run, held, patcher.clone(), place, jobs[place]) for place in mine or [0]}

    def _one(self, run: Run, held: CachedModel, patcher: RankPatcher, place: int, job: RunJob) -> RunResult:
        guided = SamplingRun(run, patcher, place, job, self._context.device)
        held.split.install(guided.model_options, job.model)
        with held.split.watching(patcher, job.model.inside):
            return guided.sample()

    def forward(self, run: Run, job: ForwardJob, may_refuse: bool = False) -> SerializedObject | NeedsBytes | None:
        """Call a method of the diffusion model once."""
        if may_refuse and (refusal := self._refusal(job.model.recipe, *filter(None, [job.latent_shape]))):
            return refusal
        with mode_of(job.model.recipe.sharding):
            held, patcher = self._ready(run, job.model)
            run.enter("step (one forward of the model)")
            output = self._forward.call(patcher, job, held.split)
        return answer(output) if run.rank == 0 else None

    def free(self, run: Run) -> None:
        """Unload every model."""
        self._forward.clear()
        self._models.clear()

    def inventory(self) -> str:
        """Return in words what this rank holds in memory."""
        return model_cache.in_words(self._context.device, self._models.all())

    def recover(self) -> bool:
        """Reset the models after a failure that all ranks met alike."""
        return all([reset(held.patcher.model.diffusion_model) for held in self._models.all()])

    def memory(self, run: Run) -> RankMemory:
        """Return how much memory this rank uses, and its models."""
        return model_cache.memory(self._context.device, self._models.all())

    def _refusal(self, recipe: ModelRecipe, *latent_shapes: tuple[int, ...]) -> NeedsBytes | None:
        """Return what ComfyUI should free for a model, and for sampling latents of these shapes; None where nothing is
        missing. Collective."""
        missing = self._models.shortfall(recipe, latent_shapes)
        return NeedsBytes(missing) if missing > 0 else None

    def _ready(self, run: Run, job: ModelJob) -> tuple[CachedModel, RankPatcher]:
        """The model of a job with its patches, and room for it where it runs; the patcher is for this job alone."""
        held = self._hold(run, job.recipe)
        run.enter(f"putting LoRAs and patches on {job.recipe.name}")
        patcher = held.patched(job.recipe.loras, job.patches).clone()
        self._models.make_room_on_device(patcher.model_size() - patcher.loaded_size(), held)
        return held, patcher

    def _hold(self, run: Run, recipe: ModelRecipe) -> CachedModel:
        held = self._models.get(recipe)
        if held is None:
            run.enter(f"loading {recipe.name}")
            if recipe.sharding != REPLICATED:
                share = recipe.size // self._context.world_size
                self._models.make_room_on_host(share)
                if recipe.sharding == SHARDED:
                    self._models.make_room_on_device(share)
            try:
                held = load_parallel(recipe.without_loras, self._context.mesh, self._context.device)
            except BaseException:
                self._models.sweep()  # what was read already
                raise
            self._models.add(held)
            logger.info("holds %s", recipe.name)
        return held
