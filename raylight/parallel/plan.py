"""The rules of a sequence plan: where a model's token streams are sharded, how they are attended to, and gathered.

A plan is data. It names modules by their path in the model: `*` is every entry of a ModuleList, `-1` its last one, and
"" the model itself. It names arguments of a module's `forward` by name, or by position for `*args`.

Example. A model of blocks `forward(txt, img, pe)`, which attend to text and image tokens together, and a last layer:

    SequencePlan(
        model="my_package.MyModel",
        inputs={"blocks.*": {"txt": Stream("txt"), "img": Stream("img"), "pe": Aligned(("txt", "img"), dim=2)}},
        attention={"blocks.*": SelfAttention(("txt", "img"))},
        outputs={"final_layer": Gather("img")},
    )

With 2 ranks, 2 text tokens, 5 image tokens, width 64 and 4 heads of 16, before -> after on rank 0 | rank 1:

    blocks.0, txt     (1, 2, 64)                    -> (1, 1, 64) | (1, 1, 64)        each rank takes its shard
    blocks.0, img     (1, 5, 64)                    -> (1, 3, 64) | (1, 2, 64)        no padding: 5 = 3 + 2
    blocks.0, pe      (1, 1, 7, 8)                  -> (1, 1, 4, 8) | (1, 1, 3, 8)    its rows of txt, then of img
    attention, q      (1, 4, 4, 16) | (1, 4, 3, 16) -> (1, 2, 7, 16) on both          all tokens of half of the heads
    attention, out    (1, 2, 7, 16) on both         -> (1, 4, 4, 16) | (1, 4, 3, 16)  all heads of the rank's tokens
    blocks.1, txt, img                                 unchanged: they are sharded already
    final_layer, out  (1, 3, 64) | (1, 2, 64)       -> (1, 5, 64) on both             all-gather
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Protocol

from torch import Tensor


class TokenLayout(Protocol):
    """How the streams of one forward are sharded, as a `Converted` argument may ask: `TokenState` has it."""

    rank: int

    def total(self, streams: Sequence[str]) -> int:
        """Return the number of tokens of `streams` on all ranks together."""
        ...

    def spans(self, streams: Sequence[str], rank: int) -> list[tuple[int, int]]:
        """Return `(start, stop)` of `rank`'s tokens of each stream, counted over the concatenated full streams."""
        ...

    def shard(self, value: Any, rule: Input) -> Any:
        """Return this rank's shard of an argument."""


@dataclass(frozen=True, slots=True)
class Stream:
    """The argument is the token stream `name`, (..., tokens at `dim`, ...). It is sharded when a forward first meets it
    and stays sharded until a `Gather`; met again after that, it is sharded again.

    `index`: the stream is that entry of a tuple. `grid`: its tokens lie on this many dimensions from `dim` on; the
    sharded form of (T, H, W) is (S_LOCAL, 1, 1), and a gather restores (T, H, W). `after`: tokens of these streams,
    already sharded, precede it in the argument.
    """

    name: str
    dim: int = 1
    index: int | None = None
    grid: int = 1
    after: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Aligned:
    """The argument has one row along `dim` for each token of the concatenated `streams` (RoPE tables, modulation).

    It is a tensor, or a tuple, list or dict of such tensors. A single row serves all tokens and is not sharded. With
    `expand`, each of fewer rows than tokens is repeated for consecutive tokens (modulation per frame); without it,
    fewer rows are an error.
    """

    streams: tuple[str, ...]
    dim: int = 1
    expand: bool = False


@dataclass(frozen=True, slots=True)
class TokenRanges:
    """The argument is a list of `(start, stop, ...)` in token indices of the concatenated `streams`. A stop of None is
    the end. Tensors that follow have a row for each token of the range. The model counts streams in `local` after
    sharding, so these have their local length.
    """

    streams: tuple[str, ...]
    local: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenIndex:
    """A token index that divides `stream` into two ranges treated differently."""

    stream: str


@dataclass(frozen=True, slots=True)
class TokenPrefix:
    """Number of leading tokens of `stream` that attention covers; tracked as the stream `name`."""

    stream: str
    name: str


@dataclass(frozen=True, slots=True)
class Unsupported:
    """The model cannot be split when this argument is given. `reason` is shown to the user."""

    reason: str


@dataclass(frozen=True, slots=True)
class Converted:
    """The argument has a type of the model's own; `convert(value, layout)` returns this rank's form of it."""

    convert: Callable[[Any, TokenLayout], Any]


@dataclass(frozen=True, slots=True)
class Gathered:
    """The argument is the sharded `stream`, or is aligned with it, a tensor or a tuple or list of tensors: it is
    all-gathered along `dim` for this module only. The module's output is not sharded.
    """

    stream: str
    dim: int = 1


@dataclass(frozen=True, slots=True)
class GatherAround:
    """The module mixes tokens by other means than attention (a convolution): the argument, the sharded `stream`, is
    all-gathered along `dim` before it, and its output is sharded again. Every rank does all of the module's work.
    """

    stream: str
    dim: int = 1


@dataclass(frozen=True, slots=True)
class Control:
    """The argument is a dict of lists of residuals (B, tokens, width), which the model adds to the first tokens of
    `stream` between its blocks. Each residual is sharded when the model takes it from the list.
    """

    stream: str


@dataclass(frozen=True, slots=True)
class Gather:
    """The module's output, or its entry `index` if it is a tuple, is the sharded `stream`; all-gather it along `dim`.

    `after`: tokens of these streams precede it in the output and stay sharded. `patched`: gather only in forwards with
    node patches of this kind, which the model calls between blocks with slices of full tokens.
    """

    stream: str
    dim: int = 1
    index: int | None = None
    after: tuple[str, ...] = ()
    patched: str = ""


@dataclass(frozen=True, slots=True)
class Dropped:
    """The sharded stream `name` ends with this module: no code uses it after that."""

    name: str


@dataclass(frozen=True, slots=True)
class SelfAttention:
    """Queries, keys and values of attention calls in this module are the concatenated tokens of `streams`.

    `calls` is the number of such calls in one forward of the module, or a function of the module that returns it. Fewer
    are an error: attention then bypassed Raylight. `mask(module, tokens, q)` returns the mask (B|1, H|1, S, S) over all
    tokens, or None; give it if the model makes a mask from the positions of the tokens it sees.
    """

    streams: tuple[str, ...]
    mask: Callable[..., Tensor | None] | None = None
    calls: int | Callable[[Any], int] = 1


@dataclass(frozen=True, slots=True)
class CrossAttention:
    """Queries are the concatenated tokens of `streams`. Keys and values are replicated, so nothing is exchanged."""

    streams: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FullAttention:
    """Queries, keys and values are replicated, so nothing is exchanged."""


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
# A tuple if the module attends to different streams in turn: the number of queries selects the rule.
Attention = SelfAttention | CrossAttention | FullAttention | tuple[SelfAttention, ...]


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """The rules by which one model class is split by sequence.

    `model`: the import path of the class. `heads`: its number of attention heads, or the path of the attribute with it.
    `patches`: for each kind of node patch in or between blocks, which of its arguments have one row per token; results
    by the same names have, too. `unhooked`: Python modules of the model that call ComfyUI's attention without passing
    its options. `refused(model)`: why this instance cannot be split, or None. `independent_rows`: whether the model
    computes each row of a batch by itself; if not, only its tokens are split.

    Raises ValueError: when a rule names a stream that no input introduces.
    """

    model: str
    inputs: Mapping[str, Mapping[str | int, Input]]
    attention: Mapping[str, Attention]
    outputs: Mapping[str, Gather | tuple[Gather | Dropped, ...]]
    heads: str | int = "num_heads"
    patches: Mapping[str, Mapping[str, Aligned]] = field(default_factory=dict)
    unhooked: tuple[str, ...] = ()
    refused: Callable[[Any], str | None] = lambda model: None
    independent_rows: bool = True
    streams: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        inputs = [rule for module in (*self.inputs.values(), *self.patches.values()) for rule in module.values()]
        streams = tuple(dict.fromkeys(rule.name for rule in inputs if isinstance(rule, (Stream, TokenPrefix))))
        object.__setattr__(self, "streams", streams)
        attention = [rule for value in self.attention.values() for rule in alternatives(value)]
        used = {name for rule in (*inputs, *attention, *self.gathers()) for name in _streams_of(rule)}
        if unknown := used - set(streams):
            raise ValueError(f"the plan of {self.model} names streams that no input introduces: {sorted(unknown)}")

    def gathers(self) -> list[Gather]:
        """Return every `Gather` of the plan."""
        rules = [one for rule in self.outputs.values() for one in (rule if isinstance(rule, tuple) else (rule,))]
        return [rule for rule in rules if isinstance(rule, Gather)]

    def heads_of(self, model: Any) -> int:
        """Return the number of attention heads of a model of this plan."""
        return self.heads if isinstance(self.heads, int) else attrgetter(self.heads)(model)


def alternatives(attention: Attention) -> tuple[SelfAttention | CrossAttention | FullAttention, ...]:
    """Return the rules of a module's attention calls, one of which applies to each call."""
    return attention if isinstance(attention, tuple) else (attention,)


def _streams_of(rule: Input | Gather | SelfAttention | CrossAttention | FullAttention) -> tuple[str, ...]:
    """Return the streams that a rule refers to."""
    match rule:
        case Unsupported() | Converted() | FullAttention():
            return ()
        case Stream(name, after=after) | Gather(name, after=after):
            return (name, *after)
        case Aligned() | TokenRanges() | SelfAttention() | CrossAttention():
            return rule.streams
        case _:
            return (rule.stream,)
