"""The service of a worker: load models, keep them, and sample with them."""

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

from . import load_progress, model_cache
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
        with mode_of(recipe.sharding), load_progress.for_run(run, recipe):
            model = self._load(run, recipe)
            run.enter("reading LoRAs")
            model.patched(recipe.loras)
        return None

    def sample(self, run: Run, jobs: tuple[RunJob, ...], may_refuse: bool = False) -> dict[int, RunResult] | NeedsBytes:
        """Do complete runs of one model."""
        first = jobs[0]
        if may_refuse and (refusal := self._refusal(first.model.recipe, *[job.latent_shape for job in jobs])):
            return refusal
        self._forward.clear()  # a run must not find on the model what single forwards have left there
        recipe = first.model.recipe
        with mode_of(recipe.sharding), load_progress.for_run(run, recipe):
            model, patcher = self._prepare(run, first.model)
            results = self._sample_all(run, model, patcher, jobs)
            run.enter("sending the result")
            if first.free_memory_after:
                comfy.model_management.unload_all_models()
                comfy.model_management.soft_empty_cache()
        return results if sequence_axis(self._context.mesh).get_local_rank() == 0 else {}

    def _sample_all(
        self, run: Run, model: CachedModel, patcher: RankPatcher, jobs: tuple[RunJob, ...]
    ) -> dict[int, RunResult]:
        """Return the results of this rank's runs by index."""
        if len(jobs) == 1:
            return {0: self._sample(run, model, patcher, 0, jobs[0])}
        batch = self._context.mesh["batch"]
        mine = list(range(batch.get_local_rank(), len(jobs), batch.size()))
        with model.parallel.independent_groups(in_step=model.recipe.sharding != REPLICATED):
            # A group without a run does the first one too, as it would only wait otherwise.
            return {index: self._sample(run, model, patcher.clone(), index, jobs[index]) for index in mine or [0]}

    def _sample(self, run: Run, model: CachedModel, patcher: RankPatcher, index: int, job: RunJob) -> RunResult:
        sampling = SamplingRun(run, patcher, index, job, self._context.device)
        model.parallel.install(sampling.model_options, job.model)
        with model.parallel.watching(patcher, job.model.inside):
            return sampling.sample()

    def forward(self, run: Run, job: ForwardJob, may_refuse: bool = False) -> SerializedObject | NeedsBytes | None:
        """Call a method of the diffusion model once."""
        if may_refuse and (refusal := self._refusal(job.model.recipe, *filter(None, [job.latent_shape]))):
            return refusal
        recipe = job.model.recipe
        with mode_of(recipe.sharding), load_progress.for_run(run, recipe):
            model, patcher = self._prepare(run, job.model)
            run.enter("step (one forward of the model)")
            output = self._forward.call(patcher, job, model.parallel)
        return answer(output) if run.rank == 0 else None

    def free(self, run: Run) -> None:
        """Unload every model."""
        self._forward.clear()
        self._models.clear()

    def inventory(self) -> str:
        """Return in words what this rank holds in memory."""
        return model_cache.describe(self._context.device, self._models.all())

    def recover(self) -> bool:
        """Reset the models after a failure that all ranks met alike."""
        return all(
            [reset(model.patcher.model.diffusion_model) for model in self._models.all()]
        )  # all of them: collective

    def memory(self, run: Run) -> RankMemory:
        """Return how much memory this rank uses, and its models."""
        return model_cache.memory(self._context.device, self._models.all())

    def _refusal(self, recipe: ModelRecipe, *latent_shapes: tuple[int, ...]) -> NeedsBytes | None:
        """Return what ComfyUI should free for a model, and for sampling latents of these shapes; None if nothing is
        missing. Collective.
        """
        missing = self._models.shortfall(recipe, latent_shapes)
        return NeedsBytes(missing) if missing > 0 else None

    def _prepare(self, run: Run, job: ModelJob) -> tuple[CachedModel, RankPatcher]:
        """Return the model of a job, and a patcher for this job alone; make room for it on the device."""
        model = self._load(run, job.recipe)
        run.enter(f"applying LoRAs and patches to {job.recipe.name}")
        patcher = model.patched(job.recipe.loras, job.patches).clone()
        self._models.make_room_on_device(patcher.model_size() - patcher.loaded_size(), model)
        return model, patcher

    def _load(self, run: Run, recipe: ModelRecipe) -> CachedModel:
        """Return the model of a recipe, from the cache if it is there."""
        model = self._models.get(recipe)
        if model is None:
            run.enter(f"loading {recipe.name}")
            shard_bytes = recipe.size // self._context.world_size
            if recipe.sharding != REPLICATED:
                self._models.make_room_on_host(shard_bytes)
                if recipe.sharding == SHARDED:
                    self._models.make_room_on_device(shard_bytes)
            try:
                # Ranks agree on a cancel at every shard that they read; replicated weights are only mapped here.
                with load_progress.reported(lambda: shard_bytes, may_stop=False):
                    model = load_parallel(recipe.without_loras, self._context.mesh, self._context.device)
            except BaseException:
                self._models.sweep()  # what was read already
                raise
            self._models.add(model)
            logger.info("%s is loaded", recipe.name)
        return model
