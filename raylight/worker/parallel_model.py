"""Parallelism of one model's forwards over the ranks: batch rows, tokens of the sequence, or both."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from typing import Any

import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from raylight.attention.kernels import kernel
from raylight.host.jobs import Inside, ModelJob
from raylight.parallel.batch import BatchAxis
from raylight.parallel.external_strategies import OURS, ExternalAttention
from raylight.parallel.mesh import sequence_axis
from raylight.parallel.plan import SequencePlan
from raylight.parallel.process_group import among
from raylight.parallel.ring import HybridAttention
from raylight.parallel.sequence_attention import Strategy
from raylight.parallel.sequence_parallel import SequenceGroup, SequenceGroups
from raylight.plans import plan_for

from .batch_parallel import BatchParallel
from .node_code import TokenProbe
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

    def __init__(self, base: BaseModel, mesh: DeviceMesh, device: torch.device) -> None:
        """Install the hooks of sequence parallelism. Call it before weights are sharded: FSDP changes the model's
        class, by which its plan is found.

        Raises ValueError: when tokens must be split and the model has no plan, or cannot be split by it.
        """
        self._model, self._device = base.diffusion_model, device
        self._find_plan = _once(self._model, type(base.model_config).__name__)
        self._groups: SequenceGroups | None = None
        self._split: ComfySequenceParallel | None = None
        self._batch: BatchParallel | None = None
        self._mesh = mesh
        self._is_arranged = False
        self._install()

    def arrange(self, mesh: DeviceMesh) -> None:
        """Compute the model on another mesh of the same ranks from now on; its weights stay. Collective.

        Does nothing if it is on that mesh. Raises ValueError: as the constructor. The model must then be arranged
        again before it is used.
        """
        if self._is_arranged and mesh is self._mesh:
            return
        self.remove()
        self._mesh = mesh
        self._install()
        self.finalize_hooks()

    def remove(self) -> None:
        """Remove all hooks, which leaves the model as it was, apart from its weights."""
        self._is_arranged = False
        if self._batch is not None:
            self._batch.remove()
        if self._split is not None:
            self._split.remove()
        self._groups = self._split = self._batch = None

    def _install(self) -> None:
        sequence, batch = sequence_axis(self._mesh), BatchAxis(self._mesh.get_group("batch"))
        try:
            if sequence.size() > 1 or batch.degree > 1:
                plan = self._find_plan()
                self._split = apply_sequence_parallel(self._model, plan, self._mesh)
                self._groups = SequenceGroups(self._mesh, attrgetter(plan.heads)(self._model))
        except ValueError as error:
            if sequence.size() > 1:
                raise
            logger.info("%s: workers can only split its batch", error)
        if batch.degree > 1:
            self._batch = BatchParallel(self._model, batch, self._split)
        self._is_arranged = True

    def finalize_hooks(self) -> None:
        """Install the hook of batch parallelism. Call it when the model's weights are in place, with their hooks."""
        if self._batch is not None:
            self._batch.finalize_hooks()

    @contextmanager
    def independent_groups(self, in_step: bool) -> Iterator[None]:
        """Let each group of the batch axis do its own runs; `in_step` as for `BatchParallel`."""
        with among(sequence_axis(self._mesh).get_group()), ExitStack() as stack:
            if self._batch is not None:
                stack.enter_context(self._batch.independent_groups(in_step))
            yield

    def install(self, model_options: dict[str, Any], job: ModelJob) -> None:
        """Make forwards with these options of a patcher run in parallel, as `job` says.

        Raises ValueError: when the job's attention kernel or sequence attention cannot be used here.
        """
        if self._split is None or self._groups is None:
            return
        local, full = kernel(job.attention, self._device), bool(job.inside.full_tokens_for)
        sequence = SequenceGroup.single_rank() if full else self._groups.sequence(self._strategy(job.strategy))
        self._split.install(model_options, local)
        self._split.use(sequence)
        if self._batch is not None:
            self._batch.use(sequence, None if full else self._groups.all_ranks(local))

    @contextmanager
    def watching(self, patcher: ModelPatcher, inside: Inside) -> Iterator[None]:
        """Check the modules that `inside` names, or their replacements by object patches, within this context.

        A forward in it raises ValueError: when a watched module is called with sharded tokens, or one that must work on
        each token by itself does not.
        """
        with ExitStack() as stack:
            for path in inside.by_token if self._split is not None and self._split.tokens.degree > 1 else ():
                module = patcher.get_model_object(f"diffusion_model.{path}")
                if isinstance(module, nn.Module):
                    stack.callback(TokenProbe(path, module).remove)
            for path in inside.watched if self._split is not None else ():
                module = patcher.get_model_object(f"diffusion_model.{path}")
                stack.callback(module.register_forward_pre_hook(functools.partial(self._refuse, path)).remove)
            yield

    def _refuse(self, path: str, *_: Any) -> None:
        if self._split is not None and self._split.tokens.is_split:
            raise ValueError(
                f"a node has changed {path} of the model, which works with tokens that are split over "
                f"workers here: remove the node, or use cfg_degree, dp_degree or GPU = 1 instead"
            )

    def _strategy(self, name: str) -> Strategy:
        ulysses, ring = (self._mesh.get_group(axis) for axis in ("ulysses", "ring"))
        ours = HybridAttention(ulysses, ring)
        if name == OURS:
            return ours
        try:
            return ExternalAttention(name, ulysses, ring, ours)
        except ImportError as error:
            raise ValueError(f"sequence_attention = {name} cannot be used: {error}; choose {OURS}") from error
