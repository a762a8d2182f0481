"""Batch parallelism of one model's forwards: each group of ranks computes some of the batch rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from raylight.cluster.errors import RunCancelled
from raylight.host.patcher_state import OPTIONS, bind_arguments, run_with_wrappers
from raylight.parallel import heartbeat
from raylight.parallel.batch import BatchAxis, Rows
from raylight.parallel.process_group import any_rank_of_each
from raylight.parallel.sequence_parallel import SequenceGroup

from .layouts import Layouts, RowsAre

# Arguments of models whose batch rows are not independent: video U-Nets have frames there.
_BATCH_IS_FRAMES = ("num_video_frames",)
# Options with one entry for each chunk of the batch, for patches.
_MARKS = ("cond_or_uncond", "uuids")
_STOCK = "wrappers"


class Split(Protocol):
    """The sequence parallelism of a model."""

    def use(self, group: SequenceGroup) -> None:
        """Split the following forwards over the ranks of `group`."""


class BatchParallel:
    """A model's forwards where their batch may be split. Each forward decides, by its batch and the same on all ranks,
    over which ranks its batch rows and its tokens are split. While `may_split` is false, batch rows are not, and tokens
    as before.
    """

    def __init__(self, model: nn.Module, layouts: Layouts, split: Split | None) -> None:
        """Replace `model.forward`. `split` is the model's sequence parallelism, None if its tokens are never split."""
        self._model, self._layouts, self._split = model, layouts, split
        self._batch: BatchAxis | None = None
        self._total = 0
        self._independent = self._in_step = self._is_decided = False
        self._asked_to_cancel: Callable[[], bool] = lambda: False
        self.may_split = True
        self._own = model.forward
        self._replaced = vars(model).get("forward")  # of this one model, where its class has another
        model.forward = functools.wraps(self._own)(functools.partial(self._forward))
        self._handle: RemovableHandle | None = None

    @property
    def axis_now(self) -> str:
        """The name of the group that divides the rows of the forward of this moment, "" if none does."""
        return "" if self._batch is None else self._batch.name

    @property
    def in_step(self) -> bool:
        """Whether groups do their own runs and agree before each forward that there is one."""
        return self._in_step

    def finalize_hooks(self) -> None:
        """Register the hook that decides, before all others. Call it last, when the model has its other hooks."""
        self._handle = self._model.register_forward_pre_hook(self._decide, prepend=True, with_kwargs=True)

    def remove(self) -> None:
        """Remove the hook, and give the model its own forward again."""
        if self._handle is not None:
            self._handle.remove()
        del self._model.forward
        if self._replaced is not None:
            self._model.forward = self._replaced

    @contextmanager
    def decided(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Decide now on the forward within this context, which may be a replay that runs no hooks, or a capture. So all
        ranks decide on each forward, whichever of them replay it.
        """
        self._choose(args, kwargs)
        self._is_decided = True
        try:
            yield
        finally:
            self._is_decided = False

    @contextmanager
    def undivided(self) -> Iterator[None]:
        """Give every rank all rows within this context."""
        before, self.may_split = self.may_split, False
        try:
            yield
        finally:
            self.may_split = before

    @contextmanager
    def independent_groups(
        self, attend: Callable[[], None] | None, asked_to_cancel: Callable[[], bool] = lambda: False
    ) -> Iterator[None]:
        """Let each group of the batch axis do its own runs within this context.

        Sharded weights are all-gathered by every rank. So groups are in step if there is `attend`, which takes part in
        what the others gather in a forward: all begin forwards together, and a group that finishes early attends those
        of the others. Nor may a group stop by itself then: all do before a forward for which one rank was
        `asked_to_cancel`, by RunCancelled.
        """
        self._independent, self._in_step, self._asked_to_cancel = True, attend is not None, asked_to_cancel
        try:
            if attend is None:
                yield
                return
            with heartbeat.cancellation_checked_by(lambda: None):
                yield
                while self._any_group_has_a_forward(False):
                    with torch.no_grad():
                        attend()
        finally:
            self._independent = self._in_step = False

    def _any_group_has_a_forward(self, this_one: bool) -> bool:
        """Return whether a group has one more. Collective. Raises RunCancelled: on all ranks."""
        found, is_cancelled = any_rank_of_each([this_one, self._asked_to_cancel()], dist.group.WORLD)
        if is_cancelled:
            raise RunCancelled
        return found

    def _decide(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._is_decided:
            self._choose(args, kwargs)

    def _choose(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._in_step:
            self._any_group_has_a_forward(True)
        self._total = batch_of((*args, *kwargs.values()))
        if not self.may_split:  # a layout would be logged as what is done
            self._batch = None
            return
        if self._independent:
            layout = self._layouts.of_own_run()
        else:
            layout = self._layouts.of(self._total, _rows_in(kwargs))
        self._batch = layout.batch
        if layout.sequence is not None and self._split is not None:
            self._split.use(layout.sequence)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._batch is None:
            return self._own(*args, **kwargs)
        return run_with_wrappers(self._model, self._batch_split, args, kwargs)

    def _batch_split(self, *args: Any, **kwargs: Any) -> Any:
        if batch_of((*args, *kwargs.values())) != self._total:  # a wrapper has changed it since
            return self._own(*args, **kwargs)
        args, kwargs = bind_arguments(type(self._model).forward, self._model, args, kwargs)
        options = _options(kwargs.pop(OPTIONS, None))
        assert self._batch is not None, "the forward splits its batch"

        def call(rows: Rows) -> Any:
            marks = {name: rows.of_chunks(options[name]) for name in _MARKS if options.get(name)}
            inner = options.copy()
            inner.pop(_STOCK, None)
            inner.update(marks)
            return self._own(*rows.of(args), **rows.of(kwargs), **{OPTIONS: inner})

        return self._batch.call(call, self._total)


def _options(given: dict[str, Any] | None) -> dict[str, Any]:
    """Return the options of a forward. A graph that has this code in it depends on those only that are read one by
    one: not on all, as it would if they were looked at for being empty.
    """
    return {} if given is None else given


def _rows_in(kwargs: Mapping[str, Any]) -> RowsAre:
    """Return how the batch rows of a forward with these arguments depend on each other."""
    if any(kwargs.get(name) is not None for name in _BATCH_IS_FRAMES):
        return RowsAre.TOGETHER
    options = _options(kwargs.get(OPTIONS))
    kinds = [kind for kind, patches in options.get("patches", {}).items() if patches]
    # Such as ComfyUI's NAGuidance, which compares the positive with the negative prompt.
    if any(kind.startswith("attn") for kind in kinds):
        return RowsAre.TOGETHER
    return RowsAre.PATCHED if kinds or any(options.get("patches_replace", {}).values()) else RowsAre.INDEPENDENT


def batch_of(values: Any) -> int:
    """Return the batch rows of the first tensor: the latent, or the first of several."""
    for value in values:
        if isinstance(value, Tensor):
            return value.shape[0]
        if isinstance(value, (list, tuple)):
            return batch_of(value)
    return 0
