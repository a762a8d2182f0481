"""The service of a worker: load models, keep them, and sample with them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import numpy as np
from torch.distributed.device_mesh import DeviceMesh

from raylight.cluster.run import RankContext, Run
from raylight.cluster.serialization import SerializedObject
from raylight.host import model_files, torch_settings
from raylight.host.gpu_identity import gpu_identity
from raylight.host.jobs import (
    METHODS,
    DegreesChosen,
    ExchangeTold,
    ForwardJob,
    GivenBack,
    ModelJob,
    NeedsBytes,
    RankMemory,
    RunJob,
    RunResult,
    random_state,
)
from raylight.host.model_files import FoundFile, ModelFile
from raylight.host.recipe import OFFLOADED, REPLICATED, SHARDED, ModelRecipe
from raylight.host.vae_jobs import VaeJob, VaeResult
from raylight.host.worker_service import WorkerService
from raylight.parallel import bandwidth, memory_shares, shares
from raylight.parallel.batch import runs_of
from raylight.parallel.graphs import ON
from raylight.parallel.mesh import AXES, sequence_axis
from raylight.parallel.process_group import smallest
from raylight.parallel.ulysses import FAST_BYTES_PER_S
from raylight.sharding.fsdp import reset

from . import cuda_graphs, inventory, load_progress
from .graph_obstacles import is_compiled, obstacle
from .kept_units import GraphsOfJob
from .model_cache import CachedModel, ModelCache
from .model_forward import ModelForward, answer
from .parallel_model import graph_mode
from .parallelize import load_parallel
from .patcher import RankPatcher, mode_of, note_change
from .sampling import SamplingRun
from .sharded_patcher import ShardedPatcher
from .vae_work import VaeWork

logger = logging.getLogger(__name__)


class ModelService(WorkerService):
    """The models of one rank. Its verbs are documented in `WorkerService`."""

    def __init__(self, context: RankContext, comfyui_gpu: str = "") -> None:
        """Open the service. `comfyui_gpu` is the `gpu_identity` of the GPU that ComfyUI uses itself."""
        self._context = context  # has another mesh after a reshape
        self._gpu = gpu_identity(context.device)
        self._beside_comfyui = self._gpu != "" and self._gpu == comfyui_gpu
        self._forward = ModelForward(context.device)
        self._models = ModelCache(context.device, context.world_size, self._forget_dropped)
        bandwidth.use(context.links)
        self._vaes = VaeWork(context, self._models, self._beside_comfyui)

    def load(self, run: Run, recipe: ModelRecipe, may_refuse: bool = False) -> NeedsBytes | None:
        """Load a model with its LoRAs."""
        if may_refuse and (refusal := self._refusal_to_load(recipe)):
            return refusal
        with mode_of(recipe.sharding), load_progress.for_run(run, recipe):
            model = self._load(run, recipe)
            run.enter("reading LoRAs")
            model.patched(recipe.loras)
        return None

    def sample(self, run: Run, jobs: tuple[RunJob, ...], may_refuse: bool = False) -> dict[int, RunResult] | NeedsBytes:
        """Do complete runs of one model."""
        first = jobs[0]
        recipe, shapes = first.model.recipe, [job.latent_shape for job in jobs]
        if may_refuse and (refusal := self._refusal_to_load(recipe)):
            return refusal
        self._forward.clear()  # a run must not find on the model what single forwards have left there
        with mode_of(recipe.sharding), load_progress.for_run(run, recipe):
            model = self._load(run, recipe)
            if may_refuse and (refusal := self._models.refusal(recipe, shapes)):
                return refusal
            patcher = self._prepare(run, model, first.model, shapes)
            at_once = len(jobs) if _may_divide_runs(model) else 1
            mesh = model.parallel.mesh_for(at_once, first.model, functools.partial(_tell, run))
            together = at_once == 1 or mesh["batch"].size() == 1
            self._begin_keeping(model, first.model, may_keep=together, may_wait=not first.every_step)
            if together:
                results = self._sample_together(run, model, patcher, jobs)
            else:
                results = self._sample_in_groups(run, model, patcher, jobs, mesh)
            run.enter("sending the result")
            if first.free_memory_after:
                self._models.unload_from_device()
        if self._beside_comfyui:  # whose nodes may need it now, and not all of them ask
            self._models.free_unused()
            cuda_graphs.release_if_full(self._context.device)
        if together or recipe.sharding != REPLICATED:  # else groups end at other times
            self._models.leave_room(self._beside_comfyui)
        return results if sequence_axis(mesh).get_local_rank() == 0 else {}

    def _sample_together(
        self, run: Run, model: CachedModel, patcher: RankPatcher, jobs: tuple[RunJob, ...]
    ) -> dict[int, RunResult]:
        """Return the results of all runs by index, which all ranks do one after another."""
        if len(jobs) == 1:
            return {0: self._sample(run, model, patcher, 0, jobs[0])}
        return {index: self._sample(run, model, patcher.clone(), index, job) for index, job in enumerate(jobs)}

    def _sample_in_groups(
        self, run: Run, model: CachedModel, patcher: RankPatcher, jobs: tuple[RunJob, ...], mesh: DeviceMesh
    ) -> dict[int, RunResult]:
        """Return the results of this rank's runs by index. The groups of the batch axis of `mesh` divide them."""
        batch, in_step = mesh["batch"], model.recipe.sharding != REPLICATED
        mine = runs_of(batch.get_local_rank(), batch.size(), len(jobs))
        with model.parallel.independent_groups(mesh, in_step, lambda: run.cancel_requested):
            # A group without a run does the first one too, as it would only wait otherwise.
            return {index: self._sample(run, model, patcher.clone(), index, jobs[index]) for index in mine or [0]}

    def _sample(self, run: Run, model: CachedModel, patcher: RankPatcher, index: int, job: RunJob) -> RunResult:
        agree = smallest if model.parallel.in_step else run.check_cancelled
        sampling = SamplingRun(run, patcher, index, job, self._context.device, agree)
        if isinstance(patcher, ShardedPatcher) and is_compiled(sampling.model_options):
            patcher.weights.kept.stop()
        model.parallel.install(sampling.model_options, job.model, functools.partial(_tell, run))
        model.parallel.use_graphs(job.model, obstacle(patcher, sampling.changes, job.model))
        with model.parallel.watching(patcher, job.model.inside):
            return sampling.sample(lambda: model.parallel.tell_exchange(functools.partial(_tell_exchange, run)))

    def forward(self, run: Run, job: ForwardJob, may_refuse: bool = False) -> SerializedObject | NeedsBytes | None:
        """Call a method of the diffusion model once."""
        recipe, shapes = job.model.recipe, [job.latent_shape] if job.latent_shape else []
        if may_refuse and (refusal := self._refusal_to_load(recipe)):
            return refusal
        with mode_of(recipe.sharding), load_progress.for_run(run, recipe):
            model = self._load(run, recipe)
            if may_refuse and (refusal := self._models.refusal(recipe, shapes)):
                return refusal
            patcher = self._prepare(run, model, job.model, shapes)
            self._begin_keeping(model, job.model, shapes=shapes, may_wait=False, begins_run=job.begins_run)
            run.enter("step (one forward of the model)")
            output = self._forward.call(patcher, job, model.parallel, functools.partial(_tell, run))
            model.parallel.tell_exchange(functools.partial(_tell_exchange, run))
        random = None if job.random is None else random_state(self._context.device)
        return answer((output, random)) if run.rank == 0 else None

    def vae_decode(self, run: Run, job: VaeJob, may_refuse: bool = False) -> VaeResult | NeedsBytes:
        """Decode a latent."""
        return self._vaes.decode(run, job, may_refuse)

    def vae_encode(self, run: Run, job: VaeJob, may_refuse: bool = False) -> VaeResult | NeedsBytes:
        """Encode pictures."""
        return self._vaes.encode(run, job, may_refuse)

    def find_files(self, run: Run, files: tuple[ModelFile, ...]) -> tuple[FoundFile, ...]:
        """Return what this machine has of files."""
        run.enter("looking for model files")
        return tuple(map(model_files.find, files))

    def receive_file(self, run: Run, file: ModelFile, offset: int, data: np.ndarray, ranks: frozenset[int]) -> None:
        """Write a part of a file into this machine's cache."""
        if run.rank in ranks:
            run.enter(f"receiving {file.name}")
            model_files.receive(file, offset, data)

    def free(self, run: Run) -> None:
        """Unload every model, and forget what was sent."""
        self._forward.release()
        self._models.clear()

    def give_back(self, run: Run, wanted: dict[int, int]) -> GivenBack:
        """Give back GPU memory, of each rank as much as `wanted` has for it."""
        run.enter("giving GPU memory back to ComfyUI")
        freed = self._models.give_back(wanted.get(run.rank))
        held = sum(model.patcher.loaded_size() + model.patcher.kept_bytes for model in self._models.all())
        return GivenBack(freed, held, self._gpu)

    def inventory(self) -> str:
        """Return in words what this rank holds in memory."""
        return inventory.describe(self._context.device, self._models.all())

    def spare_bytes(self) -> int:
        """Return how many bytes gathered weights that are kept, and CUDA graphs, take on this rank."""
        kept = sum(model.patcher.kept_bytes for model in self._models.all())
        return kept + cuda_graphs.held_bytes(self._context.device)

    def recover(self) -> bool:
        """Reset the models after a failure that all ranks met alike."""
        for model in self._models.all():
            reset(model.patcher.model.diffusion_model)
        self._models.release_kept()
        return True

    def memory(self, run: Run) -> RankMemory:
        """Return how much memory this rank uses, and its models."""
        return inventory.memory(self._context.device, self._models.all())

    def _forget_dropped(self, model: CachedModel) -> None:
        self._forward.forget(model.patcher.model)

    def _refusal_to_load(self, recipe: ModelRecipe) -> NeedsBytes | None:
        """Return what this rank's GPU lacks to load a model whose weights go there at once: others go there when they
        sample, and it would be early to free memory for them. None if no GPU lacks anything. Collective.
        """
        if recipe.sharding != SHARDED or self._models.holds(recipe):
            return None
        return self._models.refusal(recipe)

    def _prepare(
        self, run: Run, model: CachedModel, job: ModelJob, latent_shapes: Sequence[tuple[int, ...]]
    ) -> RankPatcher:
        """Return a patcher of a job's model for this job alone; make room on the device for it, and to sample latents
        of these shapes.
        """
        run.enter(f"applying LoRAs and patches to {job.recipe.name}")
        if job.device_type == self._context.device.type and torch_settings.apply(job.settings):
            note_change()
        patcher = model.patched(job.recipe.loras, job.patches).clone()
        self._models.make_room_on_device(job.recipe, latent_shapes)
        if isinstance(patcher, ShardedPatcher):
            patcher.read_released()
        return patcher

    def _begin_keeping(
        self,
        model: CachedModel,
        job: ModelJob,
        shapes: Sequence[tuple[int, ...]] = (),
        may_keep: bool = True,
        may_wait: bool = True,
        begins_run: bool = True,
    ) -> None:
        """Let gathered weights stay on the GPU in this job, if they are gathered. Unless ComfyUI `may_wait` for memory
        until the end of the run, it has some left; and so much that latents of these `shapes` find what they ask for.
        """
        if not isinstance(model.patcher, ShardedPatcher):
            return
        recipe, device = job.recipe, self._context.device
        patches = (recipe.loras, job.patches.key if job.patches is not None else "") if recipe.gguf_pack else ()
        degrees = tuple(self._context.mesh[axis].size() for axis in AXES)
        context = (job.attention, job.strategy, job.inside, shares.in_use(), degrees, patches)

        def wanted() -> int:
            for_others = 0 if may_wait or not self._beside_comfyui else cuda_graphs.least_free(device)
            return max(for_others, self._models.needed(recipe, shapes) if shapes else 0)

        come_first = graph_mode(job) == ON or bandwidth.slowest_in_use() >= FAST_BYTES_PER_S
        graphs = GraphsOfJob(lambda: model.parallel.expects_graphs, come_first)
        may_keep = may_keep and job.may_keep
        model.patcher.weights.kept.begin(may_keep, begins_run, context, model.parallel.split_now, wanted, graphs)

    def _load(self, run: Run, recipe: ModelRecipe) -> CachedModel:
        """Return the model of a recipe on the mesh of this moment, from the cache if it is there."""
        model = self._models.get(recipe)
        if model is not None:
            model.parallel.arrange(self._context.mesh, self._context.by_run)
        if model is None:
            run.enter(f"loading {recipe.name}")
            ranks = self._context.world_size
            if recipe.sharding == OFFLOADED or (recipe.sharding == SHARDED and self._context.device.type == "cpu"):
                self._models.make_room_on_host(recipe.size // ranks)  # the same on all ranks, which decide alike
            to_read = memory_shares.own_part(recipe.size, ranks) if recipe.sharding == SHARDED else recipe.size // ranks
            if recipe.sharding == SHARDED:
                self._models.make_room_on_device(recipe)
            try:
                # Ranks agree on a cancel at every shard that they read; replicated weights are only mapped here.
                with load_progress.reported(lambda: to_read, may_stop=False):
                    context = self._context
                    model = load_parallel(recipe.without_loras, context.mesh, context.device, context.by_run)
            except BaseException:
                self._models.sweep()  # what was read already
                raise
            self._models.add(model)
            logger.info("%s is loaded", recipe.name)
        return model


def _may_divide_runs(model: CachedModel) -> bool:
    """Return whether groups of workers may do runs of their own. With sharded weights they agree before each forward,
    and METHODS gather weights between forwards.
    """
    has_methods = any(hasattr(model.patcher.model.diffusion_model, name) for name in METHODS)
    return model.recipe.sharding == REPLICATED or not has_methods


def _tell(run: Run, text: str) -> None:
    run.emit(DegreesChosen(text))


def _tell_exchange(run: Run, text: str) -> None:
    run.emit(ExchangeTold(text))
