"""How the ranks share the work of a model's forwards: rows of the batch, tokens of the sequence, or both."""

from __future__ import annotations

import functools
import logging
from typing import Any

from torch import Tensor, nn

from raylight.parallel.attention import SequenceAttention
from raylight.parallel.batch import BatchAxis, Rows
from raylight.parallel.crews import Crew
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
        self._told: set[str] = set()
        self._own = model.forward
        # Before all other hooks: they do as is decided here.
        model.register_forward_pre_hook(self._decide, prepend=True, with_kwargs=True)
        model.forward = functools.wraps(self._own)(functools.partial(self._forward))

    def use(self, attention: SequenceAttention, sequence: Crew, everyone: Crew | None) -> None:
        """What splits tokens in the forwards to come: `sequence` beside other rows of the batch, or `everyone`."""
        self._attention, self._sequence, self._everyone = attention, sequence, everyone

    def _decide(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        total = _batch_of((*args, *kwargs.values()))
        splits = self._batch.can_split(total) and not any(kwargs.get(name) is not None for name in _BATCH_IS_WHOLE)
        self._rows_of = total if splits else 0
        if splits:
            self._tell(f"the workers share out a batch of {total}")
        elif self._everyone is not None:
            self._tell(f"a batch of {total} is not enough for {self._batch.degree} groups of workers: all of them "
                       f"split its tokens instead")
        else:
            self._tell(f"a batch of {total} is not enough for {self._batch.degree} groups of workers, and its tokens "
                       f"cannot be split over all: each group does the same")
        crew = self._sequence if splits or self._everyone is None else self._everyone
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

    def _tell(self, what: str) -> None:
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
