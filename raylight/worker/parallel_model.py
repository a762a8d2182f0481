"""Parallelism of one model's forwards over the ranks: batch rows, tokens of the sequence, or both."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from operator import attrgetter
from typing import Any

import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from raylight.attention.kernels import kernel
from raylight.host.jobs import Inside, ModelJob
from raylight.host.patcher_state import OVERRIDE
from raylight.host.recipe import REPLICATED
from raylight.parallel import shares
from raylight.parallel.degrees import DegreesByRun
from raylight.parallel.external_strategies import OURS, ExternalAttention
from raylight.parallel.graphs import AUTO, OFF
from raylight.parallel.mesh import sequence_axis
from raylight.parallel.plan import SequencePlan
from raylight.parallel.process_group import among
from raylight.parallel.ring import HybridAttention
from raylight.parallel.sequence_attention import Strategy
from raylight.parallel.sequence_parallel import SequenceGroup, SequenceGroups
from raylight.plans import has_known_rows, plan_for
from raylight.sharding.fsdp import keep_steady, reset

from .batch_parallel import BatchParallel
from .cuda_graphs import GraphedForward, has_graphs, pool_of
from .layouts import ChosenLayouts, GivenLayouts, Tell, given
from .node_code import TokenProbe
from .one_worker import OneWorker
from .sequence_parallel import ComfySequenceParallel, apply_sequence_parallel

logger = logging.getLogger(__name__)


def _once(model: nn.Module, config: str) -> Callable[[], SequencePlan]:
    """Look up the plan of a model now. Return a function that returns it, or raises that there is none."""
    try:
        plan = plan_for(model, config)
    except ValueError as error:
        message = str(error)

        def refuse() -> SequencePlan:
            raise ValueError(message)

        return refuse
    return lambda: plan


class ParallelModel:
    """How the ranks compute one model together: by sequence, by batch, or both."""

    def __init__(
        self, base: BaseModel, mesh: DeviceMesh, device: torch.device, by_run: DegreesByRun | None = None
    ) -> None:
        """Install the hooks of sequence parallelism. With `by_run`, each forward has the mesh that it chooses.

        Raises ValueError: when tokens must be split and the model has no plan, or cannot be split by it.
        """
        self._model, self._device = base.diffusion_model, device
        self._config = type(base.model_config).__name__
        self._find_plan = _once(self._model, self._config)
        self._groups: SequenceGroups | None = None
        self._split: ComfySequenceParallel | None = None
        self._batch: BatchParallel | None = None
        self._layouts: GivenLayouts | ChosenLayouts | None = None
        self._one_worker: OneWorker | None = None
        self._graphs: GraphedForward | None = None
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
        if self._graphs is not None:
            self._graphs.remove()
        if self._split is not None:
            self._split.remove()
        if self._one_worker is not None:
            self._one_worker.remove()
        self._groups = self._split = self._batch = self._layouts = self._one_worker = self._graphs = None

    def _install(self) -> None:
        if self._mesh.size() == 1:
            with suppress(ValueError):  # no plan: ComfyUI's own attention
                self._one_worker = OneWorker(self._model, self._find_plan())
        elif self._by_run is not None:
            self._layouts = self._choosing(self._by_run)
        else:
            self._layouts = given(self._mesh, self._split_as_given())
        if has_graphs(self._device):
            self._graphs = GraphedForward(self._model, pool_of(self._device), self._split_now, self._begin)
        if self._layouts is not None:
            self._batch = BatchParallel(self._model, self._layouts, self._split)
        self._is_arranged = True

    def _split_as_given(self) -> bool:
        """Install the hooks for the tokens. Return whether batch rows are independent, as far as is known."""
        try:
            plan = self._find_plan()
            self._split = apply_sequence_parallel(self._model, plan, self._mesh)
            self._groups = SequenceGroups(self._mesh, attrgetter(plan.heads)(self._model))
        except ValueError as error:
            if sequence_axis(self._mesh).size() > 1:
                raise
            logger.info("%s: workers can only split its batch", error)
            return True
        return plan.independent_rows

    def _choosing(self, by_run: DegreesByRun) -> ChosenLayouts:
        heads, independent_rows = None, True
        try:
            plan = self._find_plan()
            independent_rows = plan.independent_rows
            # Each forward brings its group.
            self._split = ComfySequenceParallel(self._model, plan, SequenceGroup.single_rank(), ulysses_degree=1)
            heads = int(attrgetter(plan.heads)(self._model))
        except ValueError as error:
            if not has_known_rows(self._config):
                raise
            logger.warning("%s: workers can only split its batch, and do the same work without one", error)
        return ChosenLayouts(by_run, heads, independent_rows)

    def _split_now(self) -> Hashable:
        """Return what the split of tokens depends on, at this moment."""
        if self._split is None:
            return None
        tokens, strategy = self._split.tokens, self._split.attention.strategy
        degrees = strategy.degrees if isinstance(strategy, HybridAttention) else type(strategy)
        return tokens.group and tokens.group.group_name, tokens.rank, tokens.degree, degrees

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
        mode = job.graphs
        is_sharded = job.recipe.sharding != REPLICATED
        # Not measured through the product with ROCm or with sharded weights, so only if the user asks for it.
        if mode == AUTO and (torch.version.hip is not None or is_sharded):
            mode = OFF
        keep_steady(self._model, mode != OFF)
        if self._batch is not None and self._batch.in_step and not obstacle:
            obstacle = "all workers gather its weights, and agree before each forward of their runs"
        context = job.attention, job.strategy, weights, shares.in_use()
        self._graphs.use(mode, context, obstacle, whole_call=is_sharded)

    @property
    def has_graphs(self) -> bool:
        """Whether there are graphs of the model."""
        return self._graphs is not None and self._graphs.holds_any

    def drop_graphs(self) -> None:
        """Drop the model's graphs: its weights leave the GPU."""
        if self._graphs is not None:
            self._graphs.drop()

    def finalize_hooks(self) -> None:
        """Install the hook of batch parallelism. Call it when the model's weights are in place, with their hooks."""
        if self._batch is not None:
            self._batch.finalize_hooks()

    def mesh_for(self, runs: int, job: ModelJob, tell: Tell) -> DeviceMesh:
        """Return the mesh whose batch axis divides several runs of a job. If its degrees are chosen, `tell` gets them.
        Collective.
        """
        if isinstance(self._layouts, ChosenLayouts) and runs > 1:
            return self._layouts.mesh_for(runs, bool(job.inside.full_tokens_for), tell)
        return self._mesh

    @contextmanager
    def independent_groups(self, mesh: DeviceMesh, in_step: bool) -> Iterator[None]:
        """Let each group of the batch axis of `mesh_for` do its own runs; `in_step` as for `BatchParallel`."""
        with among(sequence_axis(mesh).get_group()), ExitStack() as stack:
            if self._batch is not None:
                stack.enter_context(self._batch.independent_groups(in_step))
            yield

    def install(
        self, model_options: dict[str, Any], job: ModelJob, tell: Tell = lambda _: None, begins_run: bool = True
    ) -> None:
        """Make forwards with these options of a patcher run in parallel, as `job` says. If degrees are chosen by the
        run, `tell` gets them in words, once per run.

        Raises ValueError: when the job's attention kernel or sequence attention cannot be used here.
        """
        if isinstance(self._layouts, ChosenLayouts):
            self._layouts.tell(tell, begins_run)
        if self._one_worker is not None:
            self._one_worker.install(model_options, kernel(job.attention, self._device))
        if self._split is None:
            return
        local, full = kernel(job.attention, self._device), bool(job.inside.full_tokens_for)
        strategy = functools.partial(_strategy, job.strategy)
        if isinstance(self._layouts, ChosenLayouts):
            # Neither an override of nodes nor another library's strategy can be relied on for a log-sum-exp.
            has_lse = job.strategy == OURS and not model_options.get("transformer_options", {}).get(OVERRIDE)
            given_ring = self._mesh["ring"].size() > 1
            self._layouts.use(local, strategy, job.inside, may_ring=has_lse or given_ring)
        elif self._groups is not None:
            sequence = SequenceGroup.single_rank() if full else self._groups.sequence(strategy(self._mesh))
            self._split.use(sequence)
            if self._layouts is not None:
                self._layouts.use(sequence, None if full else self._groups.all_ranks(local))
        self._split.install(model_options, local)

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
                    tokens = split.tokens
                    stack.callback(TokenProbe(path, module, lambda tokens=tokens: tokens.is_split).remove)
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


def _strategy(name: str, mesh: DeviceMesh) -> Strategy:
    ulysses, ring = (mesh.get_group(axis) for axis in ("ulysses", "ring"))
    ours = HybridAttention(ulysses, ring)
    if name == OURS:
        return ours
    try:
        return ExternalAttention(name, ulysses, ring, ours)
    except ImportError as error:
        raise ValueError(f"sequence_attention = {name} cannot be used: {error}; choose {OURS}") from error
