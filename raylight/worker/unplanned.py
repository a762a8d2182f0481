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
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from raylight.host import comfy_patches
from raylight.host.jobs import random_state, set_random_state
from raylight.host.patcher_state import OPTIONS
from raylight.parallel.batch import BatchAxis
from raylight.parallel.mesh import AXES, sequence_axis
from raylight.parallel.plan import SequencePlan
from raylight.parallel.sequence_attention import Kernel, SequenceAttention
from raylight.parallel.sequence_parallel import SequenceGroup
from raylight.parallel.tokens import TokenState
from raylight.plans.draft.draft import Undrafted, drafts
from raylight.plans.draft.proof import is_in_16_bits, signature
from raylight.plans.draft.record import Record, recording
from raylight.plans.draft.text import to_data
from raylight.sharding.fsdp import reset

from . import transformer_options
from .batch_parallel import BatchParallel
from .drafted_plans import DraftedPlans
from .layouts import GivenLayouts, Tell
from .proving import ROWS, WHOLE, Forward, Way, is_same_everywhere
from .sequence_parallel import ComfySequenceParallel, apply_sequence_parallel

logger = logging.getLogger(__name__)

# Of one model: where sizes change in every step, trying each would only make it slower.
_SIGNATURES = 32
_ALL_WHOLE = "every worker computes all of such a forward"


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
        self._kind: tuple[Any, ...] = ()
        self._full = self._is_inside = self._independent = False
        self._logged: set[str] = set()
        self._handles = comfy_patches.route_unhooked_calls(model, comfy_patches.modules_with_attention(model))
        self._rows: BatchParallel | None = None
        if mesh["batch"].size() == 1:
            axis = BatchAxis(sequence_axis(mesh).get_group())
            self._rows = BatchParallel(model, GivenLayouts(axis, independent_rows=True), None)
            self._rows.may_split = False
        self._told: dict[str, None] = {}  # in order
        self._tell: Tell = lambda _: None
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

    def tell(self, tell: Tell, begins_run: bool) -> None:
        """Tell from now on how forwards are split, in words, if it was not told since a run began."""
        self._tell = tell
        if begins_run:
            self._told.clear()

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

    def install(self, model_options: dict[str, Any], kernel: Kernel, kind: tuple[str, ...], full: bool) -> None:
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
        if self._record is not None:
            self._record.attended(q, k)
        return self.attention(kernel, q, k, v, mask, scale)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        """Compute one call of the model, by one forward or several."""
        if self._is_inside:
            return self._model._call_impl(*args, **kwargs)
        self._is_inside = True
        try:
            return self._routed(args, kwargs)
        finally:
            self._is_inside = False

    def _routed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if reason := self._why_whole(kwargs):
            self._log(f"{reason}: {_ALL_WHOLE}")
            self._say(WHOLE)
            return self._compute(WHOLE, args, kwargs)
        key = (self._kind, signature(args), signature({name: kwargs[name] for name in kwargs if name != OPTIONS}))
        way = self._ways.get(key) or self._plans.proven(key)
        if way is None and (self._independent or len(self._ways) >= _SIGNATURES):
            self._log(f"{self._plans.name} has no plan, and none is proven for forwards of such sizes: {_ALL_WHOLE}")
            self._say(WHOLE)
            with self._pause_graphs():
                return self._compute(WHOLE, args, kwargs)
        if way is None:
            with self._pause_graphs():
                return self._first(key, args, kwargs)
        self._ways[key] = way
        self._say(way)
        return self._compute(way, args, kwargs)

    def _why_whole(self, kwargs: Mapping[str, Any]) -> str:
        """Return why a forward must not be split, "" if it may: code of nodes in it may need all tokens, or keep state
        that repeated forwards would change.
        """
        options = kwargs.get(OPTIONS) or {}
        if self._full:
            return f"a node has changed {self._plans.name}, which has no plan"
        if any(options.get("patches", {}).values()) or options.get("patches_replace", {}).get("dit"):
            return f"a node has put patches between the blocks of {self._plans.name}, which has no plan"
        if any(options.get("wrappers", {}).get("diffusion_model", {}).values()):
            return f"a node has put code around the forward of {self._plans.name}, which has no plan"
        return self._plans.refused

    def _first(self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a forward whole, and find the way for others like it."""
        before = random_state(self._device)
        with recording(self._model) as self._record:
            try:
                record = self._record
                output = self._compute(WHOLE, copied(args), copied(kwargs))
            finally:
                self._record = None
        after = random_state(self._device)

        def repeat(way: Way, rank: int | None) -> Any:
            set_random_state(before)
            role = _as_given if rank is None else functools.partial(_simulated, rank)
            return self._compute(way, copied(args), copied(kwargs), role)

        recover = functools.partial(reset, self._model)
        forward = Forward(repeat, recover, output, sequence_axis(self._mesh).size(), is_in_16_bits(args))
        try:
            self._ways[key] = self._find(key, record, forward, _rows_of(args))
        finally:
            set_random_state(after)
            self._enter(WHOLE, _whole)
        self._say(self._ways[key])
        return output

    def _find(self, key: Any, record: Record, forward: Forward, rows: int) -> Way:
        """Return the way in which forwards like the recorded one are computed from now on. Collective."""
        name, (ways, reason) = self._plans.name, self._drafted(record)
        outcome = forward.prove(ways)
        if outcome.way is not None and outcome.way.plan is not None:
            self._plans.remember(key, outcome.way.plan)
            self._log(
                f"{name} has no plan: a drafted one splits its tokens over {forward.degree} workers; its output is "
                f"equal to that of the whole forward ({outcome.share:.0%} of the difference that is allowed)"
            )
            return outcome.way
        why = f"{name} has no plan, and none could be drafted ({reason or outcome.reason})"
        how = "docs/adding-a-model.md of Raylight says how to write a plan, or what to send"
        if self._rows is not None and rows >= forward.degree and forward.prove([ROWS]).way is not None:
            logger.warning("%s: the workers split the rows of a batch instead. %s", why, how)
            return ROWS
        logger.warning("%s: %s. %s", why, _ALL_WHOLE, how)
        return WHOLE

    def _drafted(self, record: Record) -> tuple[list[Way], str]:
        """Return the plans to try, those that are proven for other sizes first; or why there is none. Collective."""
        plans, reason = self._plans.known(), ""
        try:
            plans += [plan for plan in drafts(self._model, self._plans.model, record) if plan not in plans]
        except Undrafted as error:
            reason = str(error)
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
        self._enter(way, role or _as_given)
        return self._inner(*args, **kwargs)

    def _enter(self, way: Way, role: Callable[[SequenceGroup], SequenceGroup]) -> None:
        """Let the next forwards go this way, as members of `role` of the sequence's group."""
        if way.plan is not None and way.plan is not self._plan and (self._split is None or self._plan != way.plan):
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

    def _say(self, way: Way) -> None:
        """Tell how forwards are split from now on, once for each run."""
        if way.plan is not None:
            degrees = [f"{axis} {self._mesh[axis].size()}" for axis in AXES if self._mesh[axis].size() > 1]
            text = f"{' x '.join(degrees)} (no plan: a drafted one is proven)"
        elif way.rows:
            text = f"batch {sequence_axis(self._mesh).size()} (no plan, and no drafted one is equal)"
        else:
            text = "every worker does all (no plan, and none is proven)"
        if text not in self._told:
            self._told[text] = None
            self._tell("; ".join(self._told))

    def _log(self, message: str) -> None:
        """Log a message once for this model."""
        if message not in self._logged:
            self._logged.add(message)
            logger.info(message)


def _whole(_: SequenceGroup) -> SequenceGroup:
    return SequenceGroup.single_rank()


def _as_given(group: SequenceGroup) -> SequenceGroup:
    return group


def _simulated(rank: int, group: SequenceGroup) -> SequenceGroup:
    return SequenceGroup.simulated(rank, group.degree)


def _rows_of(args: tuple[Any, ...]) -> int:
    """Return the number of batch rows of the latent."""
    first = args[0][0] if args and isinstance(args[0], (list, tuple)) else args[0] if args else None
    return first.shape[0] if isinstance(first, Tensor) and first.ndim else 0


def copied(value: Any) -> Any:
    """Copy containers and tensors of an argument, which a forward may change in place."""
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) is dict:
        return {name: copied(item) for name, item in value.items()}
    return type(value)(copied(item) for item in value) if type(value) in (list, tuple) else value
