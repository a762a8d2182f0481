"""The vocabulary of a sequence plan: where a model's token streams enter, travel and leave.

A plan is data. It names modules by their path, `*` standing for every entry of a ModuleList, and
the arguments of those modules' `forward` by their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Stream:
    """The argument is the token stream `name`. It is cut where it is first met in a forward and is local from there."""

    name: str
    dim: int = 1


@dataclass(frozen=True, slots=True)
class Aligned:
    """The argument has one row for each token of `streams`, in this order, along `dim` (rope tables, modulation).

    A single row serves all tokens and is left alone. With `expand`, fewer rows than tokens are each
    repeated over consecutive tokens (per-frame modulation); without it they are an error.
    """

    streams: tuple[str, ...]
    dim: int = 1
    expand: bool = False


@dataclass(frozen=True, slots=True)
class TokenRanges:
    """The argument is a list of `(start, stop, ...)` in token positions of `streams` laid end to end.

    Streams in `local` are counted at their length on this rank, since the model measured them after the cut.
    """

    streams: tuple[str, ...]
    local: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Gather:
    """The module's output is the stream, local; it is joined again along `dim`."""

    stream: str
    dim: int = 1


@dataclass(frozen=True, slots=True)
class SelfAttention:
    """Queries, keys and values of attention calls in this module are the tokens of `streams`, in this order."""

    streams: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CrossAttention:
    """Queries are the tokens of `query`; keys and values are whole on every rank, so nothing is exchanged."""

    query: tuple[str, ...]


Input = Stream | Aligned | TokenRanges
Attention = SelfAttention | CrossAttention


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """How one model class is split by sequence.

    `model` is the import path of the class; `heads` the attribute that holds its number of attention heads.
    """

    model: str
    inputs: Mapping[str, Mapping[str, Input]]
    attention: Mapping[str, Attention]
    outputs: Mapping[str, Gather]
    heads: str = "num_heads"
    streams: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        names = {
            rule.name: None for rules in self.inputs.values() for rule in rules.values() if isinstance(rule, Stream)
        }
        object.__setattr__(self, "streams", tuple(names))
        used = {name for gather in self.outputs.values() for name in (gather.stream,)}
        for rules in self.inputs.values():
            for rule in rules.values():
                used.update(() if isinstance(rule, Stream) else rule.streams)
        for attention in self.attention.values():
            used.update(attention.streams if isinstance(attention, SelfAttention) else attention.query)
        unknown = used - set(names)
        if unknown:
            raise ValueError(f"the plan of {self.model} names streams that never enter: {sorted(unknown)}")
