"""How the ranks share the work of a model's forwards: rows of the batch, tokens of the sequence, or both."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raylight.parallel.attention import SequenceAttention
from raylight.parallel.batch import BatchAxis, Rows
from raylight.parallel.crews import Crew
from raylight.parallel.process_group import any_rank
from raylight.parallel.tokens import TokenState

from .model_wrappers import OPTIONS, named, wrapped

logger = logging.getLogger(__name__)

# Arguments of models that take the batch for something else: video U-Nets have its frames there.
_BATCH_IS_WHOLE = ("num_video_frames",)
# What ComfyUI says of each chunk of the batch, for patches.
_MARKS = ("cond_or_uncond", "uuids")
_STOCK = "wrappers"


class Sharing:
    """One model's forwards on a mesh with a batch axis. Whether a batch is dealt out is decided for each forward, on
    all ranks alike, by what it holds."""

    def __init__(self, model: nn.Module, batch: BatchAxis, tokens: TokenState | None) -> None:
        """`tokens` are those of the model's sequence hooks, None for a model that is not split by tokens."""
        self._model, self._batch, self._tokens = model, batch, tokens
        self._attention: SequenceAttention | None = None
        self._sequence: Crew | None = None
        self._everyone: Crew | None = None
        self._rows_of = 0
        self._alone = self._in_step = self._idles = False
        self._latest: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._told: set[str] = set()
        self._own = model.forward
        model.forward = functools.wraps(self._own)(functools.partial(self._forward))

    def begin(self) -> None:
        """To be called when the model has all its other hooks: they do as is decided in one that comes before them."""
        self._model.register_forward_pre_hook(self._decide, prepend=True, with_kwargs=True)

    def use(self, attention: SequenceAttention, sequence: Crew, everyone: Crew | None) -> None:
        """What splits tokens in the forwards to come: `sequence` beside other rows of the batch, or `everyone`."""
        self._attention, self._sequence, self._everyone = attention, sequence, everyone

    @contextmanager
    def alone(self, in_step: bool) -> Iterator[None]:
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
        crew = self._sequence if splits or self._alone or self._everyone is None else self._everyone
        if not self._alone:
            self._tell(total, splits)
        if crew is not None:
            crew.take(self._tokens, self._attention)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._rows_of:
            return self._own(*args, **kwargs)
        return wrapped(self._model, self._shared, args, kwargs)

    def _shared(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = named(type(self._model).forward, self._model, args, kwargs)
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
        elif self._everyone is not None:
            what = (f"a batch of {total} is not enough for {self._batch.degree} groups of workers: all of them split "
                    f"its tokens instead")
        else:
            what = (f"a batch of {total} is not enough for {self._batch.degree} groups of workers, and its tokens "
                    f"cannot be split over all: each group does the same")
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
