"""A model whose work is split over a mesh: its hooks, and what each job chooses of them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from typing import Any

import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from raylight.attention.kernels import kernel
from raylight.parallel.attention import SequenceAttention, Strategy
from raylight.parallel.batch import BatchAxis
from raylight.parallel.crews import Crews
from raylight.parallel.hooks import SequenceHooks
from raylight.parallel.long_context import OURS, LongContextAttention
from raylight.parallel.mesh import sequence_axis
from raylight.parallel.process_group import among
from raylight.parallel.ring import HybridAttention
from raylight.parallel.tokens import TokenState
from raylight.parallel.whole import WholeTokens
from raylight.plans import plan_for

from . import attention_door, attention_hook, patch_hook
from .job import Inside, ModelJob
from .sharing import Sharing
from .token_probe import TokenProbe

logger = logging.getLogger(__name__)


class SplitModel:
    """The split of one model. Must be made before weights are split: FSDP changes the class by which a plan is found.

    Raises ValueError for a model without a plan, or one that cannot be split by its plan, where tokens are to be split.
    """

    def __init__(self, base: BaseModel, mesh: DeviceMesh, device: torch.device) -> None:
        self._mesh, self._device = mesh, device
        sequence, batch = sequence_axis(mesh), BatchAxis(mesh.get_group("batch"))
        self._crews: Crews | None = None
        self._tokens: TokenState | None = None
        self._sharing: Sharing | None = None
        if sequence.size() > 1:
            self._split_tokens(base)
        elif batch.degree > 1:
            try:
                self._split_tokens(base)
            except ValueError as error:
                logger.info("%s: workers can only share out its batch", error)
                self._crews = self._tokens = None
        if batch.degree > 1:
            self._sharing = Sharing(base.diffusion_model, batch, self._tokens)

    def begin(self) -> None:
        """To be called when the model's weights are where they will be, and it has all its other hooks."""
        if self._sharing is not None:
            self._sharing.begin()

    @contextmanager
    def groups_apart(self, in_step: bool) -> Iterator[None]:
        """Within it each group of the batch axis does runs of its own; `in_step` is as for `Sharing.alone`."""
        with among(sequence_axis(self._mesh).get_group()), ExitStack() as stack:
            if self._sharing is not None:
                stack.enter_context(self._sharing.alone(in_step))
            yield

    def install(self, model_options: dict[str, Any], job: ModelJob) -> None:
        """Have what is sampled with these options share its work, as the job says.

        Raises ValueError where the library of its strategy does not work here.
        """
        if self._tokens is None or self._crews is None:
            return
        local = kernel(job.attention, self._device)
        whole = bool(job.inside.whole)
        sequence = self._crews.alone() if whole else self._crews.sequence(self._strategy(job.strategy))
        split = SequenceAttention(self._tokens, sequence.strategy)
        attention_hook.install_override(model_options, split, local)
        sequence.take(self._tokens, split)
        if self._sharing is not None:
            self._sharing.use(split, sequence, None if whole else self._crews.everyone(local))

    @contextmanager
    def watching(self, patcher: ModelPatcher, inside: Inside) -> Iterator[None]:
        """Within it, the modules that `inside` names, or what object patches put there, raise ValueError: the watched
        where they are called with split tokens, the others where they do not work on each token by itself."""
        with ExitStack() as stack:
            for path in inside.by_token if self._tokens is not None and self._tokens.degree > 1 else ():
                module = patcher.get_model_object(f"diffusion_model.{path}")
                if isinstance(module, nn.Module):
                    stack.callback(TokenProbe(path, module).remove)
            for path in inside.watched if self._tokens is not None else ():
                module = patcher.get_model_object(f"diffusion_model.{path}")
                stack.callback(module.register_forward_pre_hook(functools.partial(self._refuse, path)).remove)
            yield

    def _refuse(self, path: str, *_: Any) -> None:
        if self._tokens is not None and self._tokens.is_cut:
            raise ValueError(f"a node has changed {path} of the model, which works with tokens that are split over "
                             f"workers here: remove the node, or use cfg_degree, dp_degree or GPU = 1 instead")

    def _split_tokens(self, base: BaseModel) -> None:
        diffusion_model, sequence = base.diffusion_model, sequence_axis(self._mesh)
        plan = plan_for(diffusion_model, type(base.model_config).__name__)
        tokens = TokenState(sequence.get_local_rank(), sequence.size(), sequence.get_group())
        SequenceHooks(diffusion_model, plan, tokens, self._mesh["ulysses"].size())
        attention_door.open_for(diffusion_model, plan.unhooked)
        patch_hook.install_patches(diffusion_model, plan, WholeTokens(tokens))
        self._tokens, self._crews = tokens, Crews(self._mesh, attrgetter(plan.heads)(diffusion_model))

    def _strategy(self, name: str) -> Strategy:
        ulysses, ring = (self._mesh.get_group(axis) for axis in ("ulysses", "ring"))
        ours = HybridAttention(ulysses, ring)
        if name == OURS:
            return ours
        try:
            return LongContextAttention(name, ulysses, ring, ours)
        except ImportError as error:
            raise ValueError(f"sequence_attention = {name} cannot be used: {error}; choose {OURS}") from error
