"""How the ranks share the work of a model's forwards: rows of the batch, tokens of the sequence, or both."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from raylight.attention.kernels import kernel
from raylight.host import comfy_patches
from raylight.host.jobs import Inside, ModelJob
from raylight.host.patcher_state import OPTIONS, bind_arguments, run_with_wrappers
from raylight.parallel.batch import BatchAxis, Rows
from raylight.parallel.external_strategies import OURS, ExternalAttention
from raylight.parallel.full_tokens import FullTokens
from raylight.parallel.hooks import SequenceHooks
from raylight.parallel.mesh import sequence_axis
from raylight.parallel.process_group import among, any_rank
from raylight.parallel.ring import HybridAttention
from raylight.parallel.sequence_attention import SequenceAttention, Strategy
from raylight.parallel.sequence_group import SequenceGroup, SequenceGroups
from raylight.parallel.tokens import TokenState
from raylight.plans import plan_for

from . import transformer_options
from .node_code import TokenProbe

logger = logging.getLogger(__name__)

# Arguments of models that take the batch for something else: video U-Nets have its frames there.
_BATCH_IS_WHOLE = ("num_video_frames",)
# What ComfyUI says of each chunk of the batch, for patches.
_MARKS = ("cond_or_uncond", "uuids")
_STOCK = "wrappers"


class BatchParallel:
    """One model's forwards on a mesh with a batch axis. Whether a batch is dealt out is decided for each forward, on
    all ranks alike, by what it holds."""

    def __init__(self, model: nn.Module, batch: BatchAxis, tokens: TokenState | None) -> None:
        """`tokens` are those of the model's sequence hooks, None for a model that is not split by tokens."""
        self._model, self._batch, self._tokens = model, batch, tokens
        self._attention: SequenceAttention | None = None
        self._sequence: SequenceGroup | None = None
        self._all_ranks: SequenceGroup | None = None
        self._rows_of = 0
        self._alone = self._in_step = self._idles = False
        self._latest: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._told: set[str] = set()
        self._own = model.forward
        model.forward = functools.wraps(self._own)(functools.partial(self._forward))

    def begin(self) -> None:
        """To be called when the model has all its other hooks: they do as is decided in one that comes before them."""
        self._model.register_forward_pre_hook(self._decide, prepend=True, with_kwargs=True)

    def use(self, attention: SequenceAttention, sequence: SequenceGroup, all_ranks: SequenceGroup | None) -> None:
        """What splits tokens in the forwards to come: `sequence` beside other rows of the batch, or `all_ranks`."""
        self._attention, self._sequence, self._all_ranks = attention, sequence, all_ranks

    @contextmanager
    def independent_groups(self, in_step: bool) -> Iterator[None]:
        """Within it each group of the batch axis does runs of its own.

        With `in_step`, for weights that are gathered from all ranks, no group begins a forward before the others do:
        one that has ended its runs goes on with its last forward, for the others' sake, until all have.
        """
        self._alone, self._in_step = True, in_step
        try:
            yield
            self._idles = True
            while in_step and any_rank(False, dist.group.WORLD):
                assert self._latest is not None, "every group has a run"
                with torch.no_grad():
                    self._model(*self._latest[0], **self._latest[1])
        finally:
            self._alone = self._in_step = self._idles = False
            self._latest = None

    def _decide(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._in_step and not self._idles:
            any_rank(True, dist.group.WORLD)
            self._latest = args, kwargs
        total = _batch_of((*args, *kwargs.values()))
        splits = self._batch.can_split(total) and not self._alone
        splits = splits and not any(kwargs.get(name) is not None for name in _BATCH_IS_WHOLE)
        self._rows_of = total if splits else 0
        group_of_ranks = self._sequence if splits or self._alone or self._all_ranks is None else self._all_ranks
        if not self._alone:
            self._tell(total, splits)
        if group_of_ranks is not None:
            group_of_ranks.activate(self._tokens, self._attention)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._rows_of:
            return self._own(*args, **kwargs)
        return run_with_wrappers(self._model, self._shared, args, kwargs)

    def _shared(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = bind_arguments(type(self._model).forward, self._model, args, kwargs)
        options = kwargs.pop(OPTIONS, None) or {}

        def some(rows: Rows) -> Any:
            marks = {name: rows.of_chunks(options[name]) for name in _MARKS if options.get(name)}
            inner = {name: value for name, value in options.items() if name != _STOCK} | marks
            return self._own(*rows.of(args), **rows.of(kwargs), **{OPTIONS: inner})

        return self._batch.call(some, self._rows_of)

    def _tell(self, total: int, splits: bool) -> None:
        """Say once what is done with batches of a size."""
        if splits:
            what = f"the workers share out a batch of {total}"
        elif self._all_ranks is not None:
            what = (
                f"a batch of {total} is not enough for {self._batch.degree} groups of workers: all of them split "
                f"its tokens instead"
            )
        else:
            what = (
                f"a batch of {total} is not enough for {self._batch.degree} groups of workers, and its tokens "
                f"cannot be split over all: each group does the same"
            )
        if what not in self._told:
            self._told.add(what)
            logger.info(what)


def _batch_of(values: Any) -> int:
    """Rows of the first tensor: the latent, or the first of several."""
    for value in values:
        if isinstance(value, Tensor):
            return value.shape[0]
        if isinstance(value, (list, tuple)):
            return _batch_of(value)
    return 0


class ParallelModel:
    """The split of one model. Must be made before weights are split: FSDP changes the class by which a plan is found.

    Raises ValueError for a model without a plan, or one that cannot be split by its plan, where tokens are to be split.
    """

    def __init__(self, base: BaseModel, mesh: DeviceMesh, device: torch.device) -> None:
        self._mesh, self._device = mesh, device
        sequence, batch = sequence_axis(mesh), BatchAxis(mesh.get_group("batch"))
        self._groups: SequenceGroups | None = None
        self._tokens: TokenState | None = None
        self._sharing: BatchParallel | None = None
        if sequence.size() > 1:
            self._split_tokens(base)
        elif batch.degree > 1:
            try:
                self._split_tokens(base)
            except ValueError as error:
                logger.info("%s: workers can only share out its batch", error)
                self._groups = self._tokens = None
        if batch.degree > 1:
            self._sharing = BatchParallel(base.diffusion_model, batch, self._tokens)

    def begin(self) -> None:
        """To be called when the model's weights are where they will be, and it has all its other hooks."""
        if self._sharing is not None:
            self._sharing.begin()

    @contextmanager
    def groups_apart(self, in_step: bool) -> Iterator[None]:
        """Within it each group of the batch axis does runs of its own; `in_step` as for `BatchParallel`."""
        with among(sequence_axis(self._mesh).get_group()), ExitStack() as stack:
            if self._sharing is not None:
                stack.enter_context(self._sharing.independent_groups(in_step))
            yield

    def install(self, model_options: dict[str, Any], job: ModelJob) -> None:
        """Have what is sampled with these options share its work, as the job says.

        Raises ValueError where the library of its strategy does not work here.
        """
        if self._tokens is None or self._groups is None:
            return
        local = kernel(job.attention, self._device)
        whole = bool(job.inside.full_tokens_for)
        sequence = self._groups.single_rank() if whole else self._groups.sequence(self._strategy(job.strategy))
        split = SequenceAttention(self._tokens, sequence.strategy)
        transformer_options.install_override(model_options, split, local)
        sequence.activate(self._tokens, split)
        if self._sharing is not None:
            self._sharing.use(split, sequence, None if whole else self._groups.all_ranks(local))

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
        if self._tokens is not None and self._tokens.is_split:
            raise ValueError(
                f"a node has changed {path} of the model, which works with tokens that are split over "
                f"workers here: remove the node, or use cfg_degree, dp_degree or GPU = 1 instead"
            )

    def _split_tokens(self, base: BaseModel) -> None:
        diffusion_model, sequence = base.diffusion_model, sequence_axis(self._mesh)
        plan = plan_for(diffusion_model, type(base.model_config).__name__)
        tokens = TokenState(sequence.get_local_rank(), sequence.size(), sequence.get_group())
        SequenceHooks(diffusion_model, plan, tokens, self._mesh["ulysses"].size())
        comfy_patches.route_unhooked_calls(diffusion_model, plan.unhooked)
        transformer_options.install_patches(diffusion_model, plan, FullTokens(tokens))
        self._tokens, self._groups = tokens, SequenceGroups(self._mesh, attrgetter(plan.heads)(diffusion_model))

    def _strategy(self, name: str) -> Strategy:
        ulysses, ring = (self._mesh.get_group(axis) for axis in ("ulysses", "ring"))
        ours = HybridAttention(ulysses, ring)
        if name == OURS:
            return ours
        try:
            return ExternalAttention(name, ulysses, ring, ours)
        except ImportError as error:
            raise ValueError(f"sequence_attention = {name} cannot be used: {error}; choose {OURS}") from error
