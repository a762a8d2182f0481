"""Models without a plan: each kind of forward is first computed whole, and a split of it is used only once it is
proven equal.

The first forward of given sizes is computed whole on every rank, as one process would, and recorded. That is its
output, whatever comes after. From the record the ranks draft plans (`raylight.plans.draft`), and prove one of them
(`proving`). If none can be proven, a split of batch rows is, or every rank goes on to compute whole forwards.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from raylight.cluster.errors import is_out_of_memory
from raylight.host import comfy_patches
from raylight.host.jobs import random_state, set_random_state
from raylight.parallel.batch import BatchAxis
from raylight.parallel.heartbeat import beat
from raylight.parallel.mesh import AXES, sequence_axis
from raylight.parallel.plan import SequencePlan
from raylight.parallel.process_group import any_rank
from raylight.parallel.sequence_attention import Kernel, SequenceAttention
from raylight.parallel.sequence_parallel import SequenceGroup
from raylight.parallel.tokens import TokenState
from raylight.plans.draft.draft import Undrafted, drafts
from raylight.plans.draft.proof import is_in_16_bits
from raylight.plans.draft.record import Record, recording
from raylight.plans.draft.text import to_data
from raylight.sharding.fsdp import reset

from . import transformer_options
from .account import Account
from .batch_parallel import BatchParallel, batch_of
from .drafted_plans import DraftedPlans
from .forward_kinds import changed, code_inside, copied, kind_of
from .kept_state import kept_by
from .layouts import GivenLayouts, Tell
from .proving import ROWS, WHOLE, Forward, Inputs, Way, is_same_everywhere
from .sequence_parallel import ComfySequenceParallel, apply_sequence_parallel

logger = logging.getLogger(__name__)

# In one run: where sizes change in every step, trying each would only make it slower.
_PROOFS = 8
# Kinds of forwards that no draft is equal for, until only plans that were proven for others are tried.
_FAILURES = 3
# Of one kind that change what the model keeps, as the first of a kind may for all that follow.
_CHANGES = 2
_ALL_WHOLE = "every worker computes all of such a forward"
_HOW = "docs/adding-a-model.md of Raylight says how to write a plan, or what to send"


class UnplannedModel:
    """A diffusion model without a plan whose tokens are to be split. It stands in for `ComfySequenceParallel`."""

    def __init__(
        self,
        model: nn.Module,
        plans: DraftedPlans,
        mesh: DeviceMesh,
        device: torch.device,
        pause_graphs: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Take over the calls of `model`. `plans` are those of its class that were proven before. CUDA graphs that are
        taken within these calls are not where `pause_graphs` is entered: while a forward is not proven.
        """
        self._model, self._plans, self._mesh, self._device = model, plans, mesh, device
        self._pause_graphs = pause_graphs
        self._full_tokens = TokenState(0, 1)
        self._full_attention = SequenceAttention(self._full_tokens, SequenceGroup.single_rank().strategy)
        self._split: ComfySequenceParallel | None = None
        self._plan: SequencePlan | None = None
        self._plan_text = ""
        self._way = WHOLE
        self._sequence = SequenceGroup.single_rank()
        self._role: Callable[[SequenceGroup], SequenceGroup] = _whole
        self._record: Record | None = None
        self._ways: dict[Any, Way] = {}
        self._changes: dict[Any, int] = {}
        self._proofs = self._failures = 0
        self._kind: tuple[Any, ...] = ()
        self._full = self._is_inside = self._independent = False
        self._account = Account(mesh, logger.info)
        self._handles = comfy_patches.route_unhooked_calls(model, comfy_patches.modules_with_attention(model))
        self._rows: BatchParallel | None = None
        if mesh["batch"].size() == 1:
            axis = BatchAxis(sequence_axis(mesh).get_group())
            self._rows = BatchParallel(model, GivenLayouts(axis, independent_rows=True), None)
            self._rows.may_split = False
        self._groups: BatchParallel | None = None
        # Around all hooks, as each of the forwards that one call may become runs them all, and around CUDA graphs: a
        # graph is of one way. `nn.Module` has a place for another call.
        self._replaced = model._compiled_call_impl
        self._inner: Callable[..., Any] = self._replaced or model._call_impl
        model._compiled_call_impl = self._call

    @property
    def ways(self) -> tuple[Way, ...]:
        """The ways that have been found, one for each kind of forward."""
        return tuple(self._ways.values())

    @property
    def attention(self) -> SequenceAttention:
        """What routes the attention calls of the forward of this moment."""
        return self._full_attention if self._split is None else self._split.attention

    @property
    def tokens(self) -> TokenState:
        """The tokens of the forward of this moment: full ones, unless a draft splits them."""
        return self._full_tokens if self._split is None else self._split.tokens

    @property
    def way(self) -> Hashable:
        """The way of the forward of this moment: the plan that splits it, as text, and whether its rows are split."""
        return self._plan_text if self._way.plan is not None else "", self._way.rows

    def within(self, groups: BatchParallel | None) -> None:
        """Note what divides rows over the mesh's batch axis, as the degrees say, in whole forwards too."""
        self._groups = groups

    def tell(self, tell: Tell, begins_run: bool) -> None:
        """Tell from now on how forwards are split, in words. When a run begins, as much may be proven as in any."""
        self._account.use(tell, begins_run)
        if begins_run:
            self._proofs = 0

    def finalize_hooks(self) -> None:
        """Install the hook of batch rows. Call it when the model's weights are in place, with their hooks."""
        if self._rows is not None:
            self._rows.finalize_hooks()

    def remove(self) -> None:
        """Remove all hooks, which leaves the model as it was."""
        self._model._compiled_call_impl = self._replaced
        self._enter(WHOLE, _whole)
        if self._split is not None:
            self._split.remove()
        if self._rows is not None:
            self._rows.remove()
        for handle in self._handles:
            handle.remove()

    def install(self, model_options: dict[str, Any], kernel: Kernel, kind: tuple[Hashable, ...], full: bool) -> None:
        """Route the attention of forwards with these options here. `kind` names what a proof depends on besides sizes.
        If `full`, code of nodes in the model needs all tokens.
        """
        self._kind = (*kind, *(self._mesh[axis].size() for axis in AXES))
        self._full = full
        transformer_options.install_override(model_options, self._attend, kernel)

    def use(self, group: SequenceGroup) -> None:
        """Split the following forwards over the ranks of `group`, if they are proven."""
        self._sequence = group
        if self._split is not None:
            self._split.use(self._role(group))

    @contextmanager
    def independent_groups(self) -> Iterator[None]:
        """Prove nothing within this context, where groups of ranks do forwards of their own: what is proven must be
        known to all ranks.
        """
        self._independent = True
        try:
            yield
        finally:
            self._independent = False

    def _attend(
        self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
    ) -> Tensor:
        beat()  # a whole forward has no collective
        if self._record is not None:
            self._record.attended(q, k)
        return self.attention(kernel, q, k, v, mask, scale)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        """Compute one call of the model, by one forward or several."""
        if self._is_inside:
            return self._model._call_impl(*args, **kwargs)
        if torch.compiler.is_compiling():  # which would look into the proof
            self._enter(WHOLE, _whole)
            return self._model._call_impl(*args, **kwargs)
        self._is_inside = True
        try:
            return self._routed(args, kwargs)
        finally:
            self._is_inside = False

    def _routed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if reason := self._why_whole(kwargs):
            self._account.log(f"{reason}: {_ALL_WHOLE}")
            self._account.say(WHOLE)
            return self._compute(WHOLE, args, kwargs)
        key = (self._kind, *kind_of(args, kwargs))
        way = self._ways.get(key) or self._plans.proven(key)
        if way is None and (self._independent or self._proofs >= _PROOFS):
            self._account.log(
                f"{self._plans.name} has no plan, and none is proven for forwards of such sizes: {_ALL_WHOLE}"
            )
            self._account.say(WHOLE)
            with self._pause_graphs():
                return self._compute(WHOLE, args, kwargs)
        if way is None:
            with self._pause_graphs():
                return self._first(key, args, kwargs)
        self._ways[key] = way
        self._account.say(way)
        return self._compute(way, args, kwargs)

    def _why_whole(self, kwargs: dict[str, Any]) -> str:
        """Return why a forward must not be split, "" if it may."""
        if self._full:
            return f"a node has changed {self._plans.name}, which has no plan"
        return code_inside(self._plans.name, kwargs) or self._plans.refused

    def _first(self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a forward whole, and find the way for others like it. Collective."""
        self._proofs += 1
        before, kept = random_state(self._device), kept_by(self._model)
        with recording(self._model) as self._record:
            try:
                record = self._record
                output = self._compute(WHOLE, copied(args), copied(kwargs))
            except Exception as error:
                if is_out_of_memory(error):
                    logger.warning(
                        "%s has no plan, so the first forward of each size is computed whole by every worker, and this "
                        "one has no memory for it. %s",
                        self._plans.name,
                        _HOW,
                    )
                raise
            finally:
                self._record = None
        after = random_state(self._device)
        if any_rank(kept_by(self._model) != kept):
            self._note_change(key)
            return output

        def repeat(way: Way, rank: int | None, inputs: Inputs) -> Any:
            set_random_state(before)
            # A plan is to be proven, not what is lost in an exchange.
            role = SequenceGroup.exact if rank is None else functools.partial(_simulated, rank)
            with nullcontext() if rank is None or self._groups is None else self._groups.undivided():
                return self._compute(way, copied(changed(args, inputs.other, inputs.nudged)), copied(kwargs), role)

        recover = functools.partial(reset, self._model)
        is_sharded = any(isinstance(parameter, DTensor) for parameter in self._model.parameters())
        degree = sequence_axis(self._mesh).size()
        forward = Forward(repeat, recover, output, degree, is_in_16_bits(args), is_sharded)
        try:
            self._ways[key] = self._find(key, record, forward, batch_of(args))
        finally:
            set_random_state(after)
            self._enter(WHOLE, _whole)
        self._account.say(self._ways[key])
        return output

    def _note_change(self, key: Any) -> None:
        """Have the next forward of this kind proven instead, or none: this one changed what the model keeps."""
        self._changes[key] = self._changes.get(key, 0) + 1
        if self._changes[key] == _CHANGES:
            self._ways[key] = WHOLE
            logger.warning(
                "%s has no plan, and keeps something from one forward to the next, so that none can be repeated for a "
                "proof: %s. %s",
                self._plans.name,
                _ALL_WHOLE,
                _HOW,
            )
        self._account.say(WHOLE)

    def _find(self, key: Any, record: Record, forward: Forward, rows: int) -> Way:
        """Return the way in which forwards like the recorded one are computed from now on. Collective."""
        name, (ways, reason) = self._plans.name, self._drafted(record)
        outcome = forward.prove(ways)
        if outcome.way is not None and outcome.way.plan is not None:
            self._plans.remember(key, outcome.way.plan)
            self._account.log(
                f"{name} has no plan: a drafted one splits its tokens over {forward.degree} workers; its output is "
                f"equal to that of the whole forward ({outcome.share:.0%} of the difference that is allowed)"
            )
            return outcome.way
        self._failures += 1
        why = f"{name} has no plan, and none could be drafted ({reason or outcome.reason})"
        if self._rows is not None and rows >= forward.degree and forward.prove([ROWS]).way is not None:
            logger.warning("%s: the workers split the rows of a batch instead. %s", why, _HOW)
            return ROWS
        logger.warning("%s: %s. %s", why, _ALL_WHOLE, _HOW)
        return WHOLE

    def _drafted(self, record: Record) -> tuple[list[Way], str]:
        """Return the plans to try, those that are proven for other sizes first; or why there is none. Collective."""
        plans, reason = self._plans.known(), ""
        if self._failures < _FAILURES:
            try:
                plans += [plan for plan in drafts(self._plans.model, record) if plan not in plans]
            except Undrafted as error:
                reason = str(error)
        elif not plans:
            reason = f"as for {_FAILURES} other sizes"
        if not is_same_everywhere(json.dumps([to_data(plan) for plan in plans]).encode()):
            return [], "the workers have recorded different forwards"
        degree = self._mesh["ulysses"].size()
        fitting = [Way(plan) for plan in plans if plan.heads_of(self._model) >= degree]
        if plans and not fitting:
            reason = f"it has {plans[0].heads} attention heads, too few for ulysses_degree = {degree}"
        return fitting, reason

    def _compute(
        self,
        way: Way,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        role: Callable[[SequenceGroup], SequenceGroup] | None = None,
    ) -> Any:
        """Compute one forward. Collective if the way is not WHOLE, or weights are sharded."""
        self._enter(way, role or (lambda group: group))
        return self._inner(*args, **kwargs)

    def _enter(self, way: Way, role: Callable[[SequenceGroup], SequenceGroup]) -> None:
        """Let the next forwards go this way, as members of `role` of the sequence's group."""
        if way.plan not in (None, self._plan):
            if self._split is not None:
                self._split.remove()
            self._split = self._plan = None
            self._split = apply_sequence_parallel(self._model, way.plan, self._mesh)
            self._plan, self._plan_text = way.plan, json.dumps(to_data(way.plan))
        self._way = way
        self._role = role if way.plan is not None else _whole
        self.use(self._sequence)
        if self._rows is not None:
            self._rows.may_split = way.rows


def _whole(_: SequenceGroup) -> SequenceGroup:
    return SequenceGroup.single_rank()


def _simulated(rank: int, group: SequenceGroup) -> SequenceGroup:
    return SequenceGroup.simulated(rank, group.degree, group.weights)
