"""Parallelism of one model's forwards over the ranks: batch rows, tokens of the sequence, or both."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from raylight.attention.kernels import kernel
from raylight.host.jobs import Inside, ModelJob
from raylight.host.patcher_state import OVERRIDE
from raylight.parallel import shares
from raylight.parallel.batch import BatchAxis
from raylight.parallel.degrees import DegreesByRun
from raylight.parallel.external_strategies import is_ours
from raylight.parallel.graphs import AUTO, OFF
from raylight.parallel.mesh import sequence_axis
from raylight.parallel.plan import SequencePlan
from raylight.parallel.process_group import among
from raylight.parallel.sequence_parallel import SequenceGroup, SequenceGroups
from raylight.plans import has_known_rows, needs_whole_batch, plan_for
from raylight.sharding.fsdp import announce_to, gathered_in_step, keep_steady, reset

from .batch_parallel import BatchParallel
from .block_signs import BlockSigns
from .cuda_graphs import GraphedForward, has_graphs, pool_of
from .drafted_plans import DraftedPlans
from .exchange import Exchange
from .graph_obstacles import is_compiled
from .layouts import ChosenLayouts, GivenLayouts, Tell, given
from .node_code import TokenProbe
from .one_worker import OneWorker
from .sequence_parallel import ComfySequenceParallel, apply_sequence_parallel
from .unplanned import UnplannedModel

logger = logging.getLogger(__name__)


def _plan_or_none(model: nn.Module, config: str) -> SequencePlan | None:
    """Return the plan of a model, None if it has none."""
    try:
        return plan_for(model, config)
    except ValueError:
        return None


def graph_mode(job: ModelJob) -> str:
    """Return the mode of CUDA graphs in which forwards of a job run."""
    # Not measured with ROCm, so only if the user asks for it.
    return OFF if job.graphs == AUTO and torch.version.hip is not None else job.graphs


class ParallelModel:
    """How the ranks compute one model together: by sequence, by batch, or both."""

    def __init__(
        self, base: BaseModel, mesh: DeviceMesh, device: torch.device, by_run: DegreesByRun | None = None
    ) -> None:
        """Install the hooks of sequence parallelism. With `by_run`, each forward has the mesh that it chooses.

        A model without a plan is split by one that its first forward proves, if any. Raises ValueError: when tokens
        must be split and the model cannot be split by its plan.
        """
        self._model, self._device = base.diffusion_model, device
        self._config = type(base.model_config).__name__
        self._plan = _plan_or_none(self._model, self._config)
        # Collective, so only where there are other ranks.
        self._drafted = DraftedPlans(base) if self._plan is None and mesh.size() > 1 else None
        self._groups: SequenceGroups | None = None
        self._split: ComfySequenceParallel | UnplannedModel | None = None
        self._batch: BatchParallel | None = None
        self._layouts: GivenLayouts | ChosenLayouts | None = None
        self._one_worker: OneWorker | None = None
        self._signs: BlockSigns | None = None
        self._graphs: GraphedForward | None = None
        self._exchange = Exchange()
        self._mesh, self._by_run = mesh, by_run
        self._is_arranged = False
        self._install()

    def arrange(self, mesh: DeviceMesh, by_run: DegreesByRun | None = None) -> None:
        """Compute the model on another mesh of the same ranks from now on, or on those that `by_run` chooses; its
        weights stay. Collective.

        Does nothing if it does so already. Raises ValueError: as the constructor. The model must then be arranged
        again before it is used.
        """
        if self._is_arranged and mesh is self._mesh and by_run is self._by_run:
            return
        self.remove()
        self._mesh, self._by_run = mesh, by_run
        self._install()
        self.finalize_hooks()

    def remove(self) -> None:
        """Remove all hooks, which leaves the model as it was, apart from its weights."""
        self._is_arranged = False
        if self._batch is not None:
            self._batch.remove()
        if self._split is not None:
            self._split.remove()
        if self._graphs is not None:
            self._graphs.remove()
        if self._one_worker is not None:
            self._one_worker.remove()
        if self._signs is not None:
            self._signs.remove()
        self._groups = self._split = self._batch = self._layouts = self._one_worker = self._graphs = None
        self._signs = None

    def _install(self) -> None:
        # Before whatever replaces the model's forward to divide its rows: a graph is of the rows of this rank.
        if has_graphs(self._device):
            graphs, exchange = pool_of(self._device), self._exchange
            self._graphs = GraphedForward(
                self._model, graphs, self.split_now, self._begin, self._way, exchange.begins_forward, self._decided
            )
        self._signs = BlockSigns(self._model, self._device)
        if self._mesh.size() == 1:
            if self._plan is not None:  # else ComfyUI's own attention
                self._one_worker = OneWorker(self._model, self._plan)
        elif self._drafted is not None:
            self._layouts = self._without_plan(self._drafted)
        elif self._by_run is not None:
            self._layouts = self._choosing(self._by_run)
        else:
            self._layouts = given(self._mesh, self._split_as_given())
        if self._layouts is not None:
            self._batch = BatchParallel(self._model, self._layouts, self._split)
        if isinstance(self._split, UnplannedModel):
            self._split.within(self._batch)
        self._is_arranged = True

    def _split_as_given(self) -> bool:
        """Install the hooks for the tokens. Return whether batch rows are independent, as far as is known."""
        assert self._plan is not None, "there is a plan"
        try:
            self._split = apply_sequence_parallel(self._model, self._plan, self._mesh)
            self._groups = SequenceGroups(self._mesh, self._plan.heads_of(self._model))
        except ValueError as error:
            if sequence_axis(self._mesh).size() > 1:
                raise
            logger.info("%s: workers can only split its batch", error)
            return True
        return self._plan.independent_rows

    def _choosing(self, by_run: DegreesByRun) -> ChosenLayouts:
        assert self._plan is not None, "there is a plan"
        # Each forward brings its group.
        self._split = ComfySequenceParallel(self._model, self._plan, SequenceGroup.single_rank(), ulysses_degree=1)
        return ChosenLayouts(by_run, self._plan.heads_of(self._model), self._plan.independent_rows)

    def _without_plan(self, drafted: DraftedPlans) -> GivenLayouts | ChosenLayouts | None:
        """Let a draft split the tokens once it is proven, or only rows be split."""
        if has_known_rows(self._config):
            logger.warning(
                "%s has no sequence plan (%s): workers can only split its batch, and do the same work without one",
                drafted.name,
                drafted.reason,
            )
            if self._by_run is not None:
                return ChosenLayouts(self._by_run, None, independent_rows=True)
            # Ranks that would split tokens divide the rows if no others are there to do so.
            axis = self._mesh["batch"] if self._mesh["batch"].size() > 1 else sequence_axis(self._mesh)
            return GivenLayouts(BatchAxis(axis.get_group()), independent_rows=True)
        if sequence_axis(self._mesh).size() > 1:
            # With degrees by the run too, as it is not known before a draft is proven whether tokens can be split: on
            # the mesh that has all ranks in the sequence.
            pause = nullcontext if self._graphs is None else self._graphs.paused
            self._split = UnplannedModel(self._model, drafted, self._mesh, self._device, pause)
        else:
            logger.info("%s has no sequence plan: workers can only split its batch", drafted.name)
        return given(self._mesh, independent_rows=not needs_whole_batch(self._config))

    def split_now(self) -> Hashable:
        """Return what the split of tokens and of rows depends on, at this moment."""
        rows = "" if self._batch is None else self._batch.axis_now
        if self._split is None:
            return rows
        tokens, strategy = self._split.tokens, self._split.attention.strategy
        degrees = getattr(strategy, "degrees", None) or type(strategy)
        name = tokens.group.group_name if isinstance(tokens.group, dist.ProcessGroup) else None
        return name, tokens.rank, tokens.degree, degrees, rows

    def _way(self) -> Hashable:
        """Return what is proven of the forward that begins, in a model without a plan."""
        return self._split.way if isinstance(self._split, UnplannedModel) else None

    def _decided(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AbstractContextManager[None]:
        return nullcontext() if self._batch is None else self._batch.decided(args, kwargs)

    def _begin(self) -> None:
        """Bring the split of tokens, and of weights, back to the start of a forward."""
        if self._split is not None:
            self._split.tokens.begin()
        reset(self._model)

    def use_graphs(self, job: ModelJob, obstacle: str) -> None:
        """Replay the forwards of this job as CUDA graphs, as it says, unless there is an `obstacle`."""
        if self._graphs is None:
            return
        # Layers of GGUF files add patches to weights in each forward.
        patches = job.patches.key if job.patches is not None else ""
        weights = (job.recipe.loras, patches) if job.recipe.gguf_pack else ()
        mode = graph_mode(job)
        keep_steady(self._model, mode != OFF, self._graphs.drop)
        if self.in_step and not obstacle:
            obstacle = "all workers gather its weights, and agree before each forward of their runs"
        context = job.attention, job.strategy, weights, shares.in_use()
        self._graphs.use(mode, context, obstacle, announce_to(self._model))

    @property
    def has_graphs(self) -> bool:
        """Whether there are graphs of the model."""
        return self._graphs is not None and self._graphs.holds_any

    @property
    def expects_graphs(self) -> bool:
        """Whether forwards of this job are, or may become, graphs on this rank."""
        return self._graphs is not None and self._graphs.expects_any

    def drop_graphs(self) -> None:
        """Drop the model's graphs: its weights leave the GPU."""
        if self._graphs is not None:
            self._graphs.drop()

    def finalize_hooks(self) -> None:
        """Install the hook of batch parallelism. Call it when the model's weights are in place, with their hooks."""
        if self._batch is not None:
            self._batch.finalize_hooks()
        if isinstance(self._split, UnplannedModel):
            self._split.finalize_hooks()

    def mesh_for(self, runs: int, job: ModelJob, tell: Tell) -> DeviceMesh:
        """Return the mesh whose batch axis divides several runs of a job. If its degrees are chosen, `tell` gets them.
        Collective.
        """
        if isinstance(self._layouts, ChosenLayouts) and runs > 1:
            return self._layouts.mesh_for(runs, bool(job.inside.full_tokens_for), tell)
        return self._mesh

    @property
    def in_step(self) -> bool:
        """Whether groups do their own runs and stop together only."""
        return self._batch is not None and self._batch.in_step

    @contextmanager
    def independent_groups(
        self, mesh: DeviceMesh, in_step: bool, asked_to_cancel: Callable[[], bool] = lambda: False
    ) -> Iterator[None]:
        """Let each group of the batch axis of `mesh_for` do its own runs, `in_step` where weights are sharded. The rest
        is as for `BatchParallel`.
        """
        with among(sequence_axis(mesh).get_group()), ExitStack() as stack:
            if isinstance(self._split, UnplannedModel):
                stack.enter_context(self._split.independent_groups())
            if self._batch is not None:
                attend = stack.enter_context(gathered_in_step(self._model)) if in_step else None
                stack.enter_context(self._batch.independent_groups(attend, asked_to_cancel))
            yield

    def install(
        self, model_options: dict[str, Any], job: ModelJob, tell: Tell = lambda _: None, begins_run: bool = True
    ) -> None:
        """Make forwards with these options of a patcher run in parallel, as `job` says. If degrees are chosen by the
        run, `tell` gets them in words, once per run.

        Raises ValueError: when the job's attention kernel or sequence attention cannot be used here.
        """
        self._exchange.begin(job.strategy, begins_run, is_compiled(model_options))
        if isinstance(self._layouts, ChosenLayouts):
            self._layouts.tell(tell, begins_run)
        if self._one_worker is not None:
            self._one_worker.install(model_options, kernel(job.attention, self._device))
        if isinstance(self._split, UnplannedModel):
            self._install_unplanned(self._split, model_options, job, tell, begins_run)
            return
        if self._split is None:
            return
        local, full = kernel(job.attention, self._device), bool(job.inside.full_tokens_for)
        exchange = self._exchange
        if isinstance(self._layouts, ChosenLayouts):
            # Neither an override of nodes nor another library's strategy can be relied on for a log-sum-exp.
            has_lse = is_ours(job.strategy) and not model_options.get("transformer_options", {}).get(OVERRIDE)
            given_ring = self._mesh["ring"].size() > 1
            self._layouts.use(local, exchange.strategy, job.inside, may_ring=has_lse or given_ring)
        elif self._groups is not None:
            sequence = SequenceGroup.single_rank() if full else self._groups.sequence(exchange.strategy(self._mesh))
            self._split.use(sequence)
            if self._layouts is not None:
                self._layouts.use(sequence, None if full else self._groups.all_ranks(local, exchange.meter))
        self._split.install(model_options, local)

    def tell_exchange(self, tell: Tell) -> None:
        """Tell once in a run, when its first step is over, in words what an exchange in 8 bits has changed."""
        self._exchange.tell(tell)

    def _install_unplanned(
        self, split: UnplannedModel, model_options: dict[str, Any], job: ModelJob, tell: Tell, begins_run: bool
    ) -> None:
        split.tell(tell if self._by_run is not None else lambda _: None, begins_run)
        sequence = SequenceGroup.of(sequence_axis(self._mesh).get_group(), self._exchange.strategy(self._mesh))
        kind = (job.attention, job.strategy, shares.in_use())
        split.install(model_options, kernel(job.attention, self._device), kind, job.inside != Inside())
        split.use(sequence)
        if isinstance(self._layouts, GivenLayouts):
            self._layouts.use(sequence, None)

    @contextmanager
    def watching(self, patcher: ModelPatcher, inside: Inside) -> Iterator[None]:
        """Check the modules that `inside` names, or their replacements by object patches, within this context.

        A forward in it raises ValueError: when a watched module is called with sharded tokens, or one that must work on
        each token by itself does not.
        """
        with ExitStack() as stack:
            split = self._split
            for path in inside.by_token if split is not None else ():
                module = patcher.get_model_object(f"diffusion_model.{path}")
                if split is not None and isinstance(module, nn.Module):
                    stack.callback(TokenProbe(path, module, lambda split=split: split.tokens.is_split).remove)
            for path in inside.watched if split is not None else ():
                module = patcher.get_model_object(f"diffusion_model.{path}")
                stack.callback(module.register_forward_pre_hook(functools.partial(self._refuse, path)).remove)
            yield

    def _refuse(self, path: str, *_: Any) -> None:
        if self._split is not None and self._split.tokens.is_split:
            raise ValueError(
                f"a node has changed {path} of the model, which works with tokens that are split over "
                f"workers here: remove the node, or use cfg_degree, dp_degree or GPU = 1 instead"
            )
