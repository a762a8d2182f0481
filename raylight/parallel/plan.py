"""The vocabulary of a sequence plan: where a model's token streams enter, travel and leave.

A plan is data. It names modules by their path, `*` standing for every entry of a ModuleList, `-1` for
its last and "" for the model itself, and the arguments of those modules' `forward` by their names, or by their place
where `forward` takes `*args`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from .tokens import TokenState


@dataclass(frozen=True, slots=True)
class Stream:
    """The argument is the token stream `name`. It is cut where it is first met in a forward and is local from there,
    until it is gathered; where it is met again after that, it is cut again. With `index`, it is that entry of a tuple.
    With `grid`, its tokens lie on that many dimensions from `dim` on: (T, H, W) locally is (S, 1, 1), and a gather
    gives it back as it was. Tokens of the streams in `after` lie before it in the argument, and are local already.
    """

    name: str
    dim: int = 1
    index: int | None = None
    grid: int = 1
    after: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Aligned:
    """The argument has one row for each token of `streams`, in this order, along `dim` (rope tables, modulation).

    In a tuple, list or dict, every tensor has. A single row serves all tokens and is left alone. With `expand`, fewer
    rows than tokens are each repeated over consecutive tokens (per-frame modulation); without it they are an error.
    """

    streams: tuple[str, ...]
    dim: int = 1
    expand: bool = False


@dataclass(frozen=True, slots=True)
class TokenRanges:
    """The argument is a list of `(start, stop, ...)` in token positions of `streams` laid end to end; a stop of None is
    their end.

    Streams in `local` are counted at their length on this rank, since the model measured them after the cut.
    """

    streams: tuple[str, ...]
    local: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenIndex:
    """The argument is one position in `stream`, before which tokens are treated otherwise than from it on."""

    stream: str


@dataclass(frozen=True, slots=True)
class TokenPrefix:
    """The argument is how many of `stream`'s tokens, from its first on, attention is about: as a stream, `name`."""

    stream: str
    name: str


@dataclass(frozen=True, slots=True)
class Unsupported:
    """The argument is one with which this model cannot be split; `reason` is for the person at the graph."""

    reason: str


@dataclass(frozen=True, slots=True)
class Converted:
    """The argument is of a kind of the model's own; `convert` makes this rank's part of it, from the value and the
    `TokenState`."""

    convert: Callable[[Any, TokenState], Any]


@dataclass(frozen=True, slots=True)
class Gathered:
    """The argument is the stream, local, of which the module needs the whole along `dim`; its output is not cut."""

    stream: str
    dim: int = 1


@dataclass(frozen=True, slots=True)
class Control:
    """The argument is a dict of lists of residuals (B, tokens, width) that the model adds to the first tokens of
    `stream` between its blocks. They are cut when they are taken from the list, which is after the stream was."""

    stream: str


@dataclass(frozen=True, slots=True)
class Gather:
    """The module's output, or its entry `index` where it is a tuple, is the stream, local; it is joined again along
    `dim`. Tokens of the streams in `after` lie before it in the output, and stay local. With `patched`, only where a
    person's nodes have hung patches of this kind between the blocks, which the model hands slices of the stream."""

    stream: str
    dim: int = 1
    index: int | None = None
    after: tuple[str, ...] = ()
    patched: str = ""


@dataclass(frozen=True, slots=True)
class GatherAround:
    """The module mixes tokens by other means than attention (a convolution): the argument, the stream, is joined
    before it, and its output cut again, along `dim`. Its work, attention calls included, is done by every rank."""

    stream: str
    dim: int = 1


@dataclass(frozen=True, slots=True)
class SelfAttention:
    """Queries, keys and values of attention calls in this module are the tokens of `streams`, in this order.

    `mask` makes the mask over all tokens where the model makes one of its own tokens' places: from the module, the
    number of all tokens and the queries, (B|1, H|1, S, S) or None. `calls` is how many such calls the module makes in
    one forward, or tells it from the module: fewer are an error, since then attention went another way.
    """

    streams: tuple[str, ...]
    mask: Callable[[Any, int, Tensor], Tensor | None] | None = None
    calls: int | Callable[[Any], int] = 1


@dataclass(frozen=True, slots=True)
class CrossAttention:
    """Queries are the tokens of `query`; keys and values are whole on every rank, so nothing is exchanged."""

    query: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FullAttention:
    """Queries, keys and values are whole on every rank, so nothing is exchanged."""


Input = (
    Stream
    | Aligned
    | TokenRanges
    | TokenIndex
    | TokenPrefix
    | Control
    | Converted
    | Gathered
    | GatherAround
    | Unsupported
)
# Several, where one module attends within different streams: the number of queries tells them apart.
Attention = SelfAttention | CrossAttention | FullAttention | tuple[SelfAttention, ...]


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """How one model class is split by sequence.

    `model` is the import path of the class; `heads` the attribute, by its path from the model, that holds the number
    of its attention heads. `patches` says, for each kind of patch that a person's nodes hang between or into the
    blocks, which of its arguments have one row for each token; what it returns by the same names has, too.
    `unhooked` are Python modules of the model that call ComfyUI's attention without handing on its options. `refused`
    says of a model of this class why just this one cannot be split, or None.
    """

    model: str
    inputs: Mapping[str, Mapping[str | int, Input]]
    attention: Mapping[str, Attention]
    outputs: Mapping[str, Gather | tuple[Gather, ...]]
    heads: str = "num_heads"
    patches: Mapping[str, Mapping[str, Aligned]] = field(default_factory=dict)
    unhooked: tuple[str, ...] = ()
    refused: Callable[[Any], str | None] = lambda model: None
    streams: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        rules = [rule for module in (*self.inputs.values(), *self.patches.values()) for rule in module.values()]
        streams = tuple(dict.fromkeys(rule.name for rule in rules if isinstance(rule, (Stream, TokenPrefix))))
        object.__setattr__(self, "streams", streams)
        used = {name for gather in self.gathers() for name in (gather.stream, *gather.after)}
        attention = [rule for value in self.attention.values() for rule in alternatives(value)]
        for rule in (*rules, *attention):
            used.update(_streams_of(rule))
        unknown = used - set(streams)
        if unknown:
            raise ValueError(f"the plan of {self.model} names streams that never enter: {sorted(unknown)}")

    def gathers(self) -> list[Gather]:
        """Every place where a stream is joined again."""
        return [gather for rule in self.outputs.values() for gather in (rule if isinstance(rule, tuple) else (rule,))]


def alternatives(attention: Attention) -> tuple[SelfAttention | CrossAttention | FullAttention, ...]:
    """The kinds of attention call of one module."""
    return attention if isinstance(attention, tuple) else (attention,)


def _streams_of(rule: Input | SelfAttention | CrossAttention | FullAttention) -> tuple[str, ...]:
    if isinstance(rule, Stream):
        return (rule.name, *rule.after)
    if isinstance(rule, CrossAttention):
        return rule.query
    if isinstance(rule, (Unsupported, Converted, FullAttention)):
        return ()
    return (
        (rule.stream,) if isinstance(rule, (Control, Gathered, TokenIndex, TokenPrefix, GatherAround)) else rule.streams
    )
