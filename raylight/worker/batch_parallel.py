"""Batch parallelism of one model's forwards: each group of ranks computes some of the batch rows."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from raylight.host.patcher_state import OPTIONS, bind_arguments, run_with_wrappers
from raylight.parallel.batch import BatchAxis, Rows
from raylight.parallel.process_group import any_rank
from raylight.parallel.sequence_parallel import SequenceGroup, SequenceParallel

logger = logging.getLogger(__name__)

# Arguments of models whose batch rows are not independent: video U-Nets have frames there.
_BATCH_IS_FRAMES = ("num_video_frames",)
# Options with one entry for each chunk of the batch, for patches.
_MARKS = ("cond_or_uncond", "uuids")
_STOCK = "wrappers"


class BatchParallel:
    """A model's forwards on a mesh with a batch axis. Each forward decides, by its batch and the same on all ranks,
    whether its batch rows or only its tokens are split.
    """

    def __init__(self, model: nn.Module, batch: BatchAxis, split: SequenceParallel | None) -> None:
        """Replace `model.forward`. `split` is the model's sequence parallelism, None if its tokens are never split."""
        self._model, self._batch, self._split = model, batch, split
        self._sequence: SequenceGroup | None = None
        self._all_ranks: SequenceGroup | None = None
        self._rows_of = 0
        self._independent = self._in_step = self._idles = False
        self._latest: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._logged: set[str] = set()
        self._own = model.forward
        self._replaced = vars(model).get("forward")  # of this one model, where its class has another
        model.forward = functools.wraps(self._own)(functools.partial(self._forward))
        self._handle: RemovableHandle | None = None

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

    def use(self, sequence: SequenceGroup, all_ranks: SequenceGroup | None) -> None:
        """Split tokens over `sequence` in forwards that split their batch, and over `all_ranks` in the others."""
        self._sequence, self._all_ranks = sequence, all_ranks

    @contextmanager
    def independent_groups(self, in_step: bool) -> Iterator[None]:
        """Let each group of the batch axis do its own runs within this context.

        Sharded weights are all-gathered by every rank, so with `in_step` the groups run the same number of forwards: a
        group that finishes early repeats its last one until all are done.
        """
        self._independent, self._in_step = True, in_step
        try:
            yield
            self._idles = True
            while in_step and any_rank(False, dist.group.WORLD):
                assert self._latest is not None, "every group has a run"
                with torch.no_grad():
                    self._model(*self._latest[0], **self._latest[1])
        finally:
            self._independent = self._in_step = self._idles = False
            self._latest = None

    def _decide(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._in_step and not self._idles:
            any_rank(True, dist.group.WORLD)
            self._latest = args, kwargs
        total = _batch_of((*args, *kwargs.values()))
        splits = self._batch.can_split(total) and not self._independent
        splits = splits and not any(kwargs.get(name) is not None for name in _BATCH_IS_FRAMES)
        self._rows_of = total if splits else 0
        if not self._independent:
            self._log(total, splits)
        group = self._sequence if splits or self._independent or self._all_ranks is None else self._all_ranks
        if group is not None and self._split is not None:
            self._split.use(group)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._rows_of:
            return self._own(*args, **kwargs)
        return run_with_wrappers(self._model, self._batch_split, args, kwargs)

    def _batch_split(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = bind_arguments(type(self._model).forward, self._model, args, kwargs)
        options = kwargs.pop(OPTIONS, None) or {}

        def call(rows: Rows) -> Any:
            marks = {name: rows.of_chunks(options[name]) for name in _MARKS if options.get(name)}
            inner = {name: value for name, value in options.items() if name != _STOCK} | marks
            return self._own(*rows.of(args), **rows.of(kwargs), **{OPTIONS: inner})

        return self._batch.call(call, self._rows_of)

    def _log(self, total: int, splits: bool) -> None:
        """Log once what is done with batches of a size."""
        too_small = f"a batch of {total} is too small for {self._batch.degree} groups of workers"
        if splits:
            message = f"a batch of {total} is split over the workers"
        elif self._all_ranks is not None:
            message = f"{too_small}: its tokens are split over all of them instead"
        else:
            message = f"{too_small}, and its tokens cannot be split over all of them: each group does the same work"
        if message not in self._logged:
            self._logged.add(message)
            logger.info(message)


def _batch_of(values: Any) -> int:
    """Return the batch rows of the first tensor: the latent, or the first of several."""
    for value in values:
        if isinstance(value, Tensor):
            return value.shape[0]
        if isinstance(value, (list, tuple)):
            return _batch_of(value)
    return 0
