"""The state of one forward's tokens on one rank: which streams are sharded, how, and what is aligned with them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import Simulated
from .partition import Shards, shard_stream
from .plan import (
    Aligned,
    Attention,
    Control,
    Converted,
    FullAttention,
    GatherAround,
    Input,
    SelfAttention,
    Stream,
    TokenIndex,
    TokenPrefix,
    TokenRanges,
    Unsupported,
    alternatives,
)
from .shares import Weights


@dataclass(slots=True)
class Scope:
    """A module being run: its attention rule, and the number of calls so far of each kind, by its id."""

    rule: Attention | GatherAround
    calls: dict[int, int] = field(default_factory=dict)


class TokenState:
    """Tokens of rank `rank` of the `degree` ranks of `group`, which split a sequence by `weights` (see `shares`).

    Streams are sharded when a forward first meets them after `begin`, so every rank knows all sizes without exchanging
    them. A stream may have fewer tokens than there are ranks: some ranks then hold a placeholder (see `Shards`), which
    counts in `spans` and `local_length`, about this rank's tensors, but not in `sizes` and `lengths`, about what ranks
    exchange. `patched` are the kinds of node patches that the current forward calls.

    What depends on the streams only is computed once and kept until a stream changes, as are shards of arguments that
    every block gets.

    Shapes: S tokens on all ranks, S_LOCAL on this one; tensors keep their dtype.
    """

    def __init__(
        self, rank: int, degree: int, group: dist.ProcessGroup | Simulated | None = None, weights: Weights = ()
    ) -> None:
        self.use_group(rank, degree, group, weights)

    def use_group(
        self, rank: int, degree: int, group: dist.ProcessGroup | Simulated | None, weights: Weights = ()
    ) -> None:
        """Split the following forwards over these ranks; with a degree of 1, tokens stay full."""
        self.rank = rank
        self.degree = degree
        self.group = group
        self.weights = weights
        self.begin()

    def begin(self) -> None:
        """Forget the last forward, whether it finished or failed."""
        self._shards: dict[str, Shards] = {}
        self._gathered: set[str] = set()
        self._grids: dict[str, torch.Size] = {}
        self.patched: frozenset[str] = frozenset()
        self._scopes: list[Scope] = []
        self._kept: dict[Hashable, Any] = {}

    @property
    def is_split(self) -> bool:
        """Whether any stream is sharded at this point of the forward."""
        return len(self._shards) > len(self._gathered)

    def is_sharded(self, stream: str) -> bool:
        """Return whether `stream` is sharded at this point of the forward."""
        return stream in self._shards and stream not in self._gathered

    def kept(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Return `compute()`, or what it returned for this key since a stream was last sharded or gathered."""
        if key not in self._kept:
            self._kept[key] = compute()
        return self._kept[key]

    def total(self, streams: Sequence[str]) -> int:
        """Return the number of tokens of `streams` on all ranks together."""
        return sum(self._shards_of(name).total for name in streams)

    def lengths(self, streams: Sequence[str]) -> tuple[int, ...]:
        """Return each rank's number of tokens of all `streams` together."""
        return tuple(sum(self.sizes(name)[rank] for name in streams) for rank in range(self.degree))

    def sizes(self, stream: str) -> tuple[int, ...]:
        """Return each rank's number of tokens of one stream."""
        return self._shards_of(stream).sizes

    def local_length(self, streams: Sequence[str]) -> int:
        """Return the number of tokens of all `streams` in this rank's tensors."""
        return sum(stop - start for start, stop in self.spans(streams, self.rank))

    def spans(self, streams: Sequence[str], rank: int) -> list[tuple[int, int]]:
        """Return `(start, stop)` of the tokens of each stream in `rank`'s tensors, in the concatenated full streams."""
        result, base = [], 0
        for name in streams:
            shards = self._shards_of(name)
            start, stop = shards.spans[rank]
            result.append((base + start, base + stop))
            base += shards.total
        return result

    def without_placeholders(self, local: Tensor, streams: Sequence[str], dim: int) -> Tensor:
        """Return what this rank must exchange of `local`, (..., S_LOCAL at `dim`, ...): all but placeholders."""
        if not self.has_placeholders(streams):
            return local
        pieces = local.split([stop - start for start, stop in self.spans(streams, self.rank)], dim)
        own = [self.sizes(name)[self.rank] for name in streams]
        return torch.cat([piece.narrow(dim, 0, size) for piece, size in zip(pieces, own, strict=True)], dim)

    def with_placeholders(self, own: Tensor, streams: Sequence[str], dim: int) -> Tensor:
        """Invert `without_placeholders`, with zeros for placeholders."""
        if not self.has_placeholders(streams):
            return own
        pieces = []
        for name, piece in zip(streams, own.split([self.sizes(name)[self.rank] for name in streams], dim), strict=True):
            shape = list(own.shape)
            shape[dim] = self._shards_of(name).placeholders(self.rank)
            pieces += [piece, own.new_zeros(shape)]
        return torch.cat(pieces, dim)

    def has_placeholders(self, streams: Sequence[str]) -> bool:
        """Return whether this rank's tensors hold more than its own tokens of `streams`."""
        return any(self._shards_of(name).placeholders(self.rank) for name in streams)

    def _shards_of(self, stream: str) -> Shards:
        if stream not in self._shards:
            raise RuntimeError(f"token stream '{stream}' is used before the model passed it to a block")
        return self._shards[stream]

    def mark_gathered(self, stream: str) -> None:
        """Record that `stream` is full from here on in this forward."""
        self._gathered.add(stream)
        self._kept.clear()

    def restore_grid(self, full: Tensor, stream: str, dim: int) -> Tensor:
        """Return a gathered stream in the form it had before sharding: (..., S, 1, 1, ...) -> (..., T, H, W, ...)."""
        grid = self._grids.get(stream)
        return full if grid is None else full.reshape(*full.shape[:dim], *grid, *full.shape[dim + len(grid) :])

    def push(self, rule: Attention | GatherAround) -> None:
        """Enter a module whose attention calls `rule` describes."""
        self._scopes.append(Scope(rule))

    def pop(self) -> Scope:
        """Leave the innermost module, and return its rule and the calls that it made."""
        return self._scopes.pop()

    @property
    def scope(self) -> Attention | GatherAround | None:
        """The attention rule of the innermost module being run."""
        return self._scopes[-1].rule if self._scopes else None

    def count_call(self, kind: SelfAttention) -> None:
        """Count an attention call of the innermost module, which covers the tokens of all ranks."""
        calls = self._scopes[-1].calls
        calls[id(kind)] = calls.get(id(kind), 0) + 1

    def count_full_attention(self) -> None:
        """Count attention over full tokens, which replaces every call of the enclosing module."""
        around = next((scope for scope in reversed(self._scopes) if not isinstance(scope.rule, FullAttention)), None)
        if around is not None and not isinstance(around.rule, GatherAround):
            around.calls.update(
                {
                    id(kind): cast("int", kind.calls)
                    for kind in alternatives(around.rule)
                    if isinstance(kind, SelfAttention)
                }
            )

    def shard(self, value: Any, rule: Input) -> Any:
        """Return this rank's shard of an argument, by its rule in the plan.

        Raises ValueError: when the rule is `Unsupported` and the argument is given.
        Raises RuntimeError: when the argument does not fit the tokens of its streams.
        """
        if value is None:
            return None
        if (kept := self._kept.get((id(value), id(rule)))) is not None:
            return kept[-1]
        match rule:
            case Unsupported():
                raise ValueError(f"this model cannot be split over workers here: {rule.reason}")
            case Converted():
                return rule.convert(value, self)
            case TokenPrefix():
                prefix = self._shards_of(rule.stream).prefix(value)
                if self._shards.get(rule.name) != prefix:
                    self._shards[rule.name] = prefix
                    self._kept.clear()
                return self.local_length((rule.name,))
            case Stream(index=None):
                return self._shard_stream(value, rule)
            case Stream(index=int(index)):
                return (*value[:index], self._shard_stream(value[index], rule), *value[index + 1 :])
            case Control():
                return {name: LocalResiduals(items, self, rule.stream) for name, items in value.items()}
            case TokenIndex() if rule.stream not in self._gathered:
                ((start, stop),) = self.spans((rule.stream,), self.rank)
                return min(max(value, start), stop) - start
            case TokenRanges() if not self._gathered.issuperset(rule.streams):
                return self._shard_ranges(value, rule)
            case Aligned() if not self._gathered.issuperset(rule.streams):
                return self._shard_aligned(value, rule)
        return value  # its streams are full again

    def _shard_stream(self, value: Tensor, rule: Stream) -> Tensor:
        if self.is_sharded(rule.name):
            # A model may use the full stream twice before it goes on with its local output.
            full = rule.grid == 1 and not rule.after and value.shape[rule.dim] == self._shards[rule.name].total
            return self.local_shard(value, rule.name, rule.dim) if full else value
        if rule.after:
            before = self.local_length(rule.after)
            head, tail = value.split([before, value.shape[rule.dim] - before], rule.dim)
            return torch.cat([head, self._shard_stream(tail, replace(rule, after=()))], rule.dim)
        if rule.grid > 1:  # (..., T, H, W, ...) -> (..., S, 1, 1, ...)
            self._grids[rule.name] = value.shape[rule.dim : rule.dim + rule.grid]
            value = value.flatten(rule.dim, rule.dim + rule.grid - 1)
            value = value.reshape(*value.shape[: rule.dim + 1], *[1] * (rule.grid - 1), *value.shape[rule.dim + 1 :])
        total = value.shape[rule.dim]
        known = self._shards.get(rule.name)
        if known is None or known.total != total:
            sharded = [name for name in self._shards if self.is_sharded(name)]
            self._shards[rule.name] = shard_stream(total, self.lengths(sharded), self.weights)
        self._gathered.discard(rule.name)
        self._kept.clear()
        return self.local_shard(value, rule.name, rule.dim)

    def local_shard(self, full: Tensor, stream: str, dim: int) -> Tensor:
        """Return this rank's tokens of a full stream, placeholder included: (..., S, ...) -> (..., S_LOCAL, ...)."""
        ((start, stop),) = self.spans((stream,), self.rank)
        # A copy: blocks add to their input in place, and the full stream can be freed.
        return full.narrow(dim, start, stop - start).clone()

    def _shard_aligned(self, value: Any, rule: Aligned) -> Any:
        if isinstance(value, Mapping):
            return {key: self.shard(item, rule) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.shard(item, rule) for item in value)
        if not isinstance(value, Tensor):
            return value
        local = self._local_rows(value, rule)
        # The originals are kept beside the shard so that their ids cannot be reused within the forward.
        self._kept[id(value), id(rule)] = (value, rule, local)
        return local

    def _local_rows(self, value: Tensor, rule: Aligned) -> Tensor:
        rows, total = value.shape[rule.dim], self.total(rule.streams)
        if rows == 1:
            return value
        spans = self.spans(rule.streams, self.rank)
        if rows == total:
            return torch.cat([value.narrow(rule.dim, start, stop - start) for start, stop in spans], dim=rule.dim)
        if not rule.expand or rows > total:
            raise RuntimeError(
                f"an argument aligned with {rule.streams} has {rows} rows along dim {rule.dim} for {total} tokens"
            )
        # If the rows do not divide the tokens, each is repeated once more, and the last one is cut short.
        repeats = -(-total // rows)
        index = torch.cat([torch.arange(start, stop, device=value.device) for start, stop in spans])
        return value.index_select(rule.dim, index // repeats)

    def _shard_ranges(self, value: Sequence[Sequence[Any]], rule: TokenRanges) -> list[tuple[Any, ...]]:
        pieces, base, local_base = [], 0, 0
        for name in rule.streams:
            shards = self._shards_of(name)
            start, stop = shards.spans[self.rank]
            length = stop - start
            first = base if name in rule.local else base + start
            pieces.append((first, first + length, local_base))
            base += length if name in rule.local else shards.total
            local_base += length
        result = []
        for start, stop, *rest in value:
            for low, high, local in pieces:
                first, last = max(start, low), high if stop is None else min(stop, high)
                if first < last:
                    # What follows is for all tokens of the range, or a tensor with a row for each.
                    mine = (one[first - start : last - start] if isinstance(one, Tensor) else one for one in rest)
                    result.append((first - low + local, last - low + local, *mine))
        return result


class LocalResiduals(list):
    """A list of residuals (B, tokens, width) whose entries are this rank's tokens (B, S_LOCAL, width) while the stream
    is sharded.

    A residual may cover only the first tokens of its stream; its shard then does, too.
    """

    def __init__(self, items: Sequence[Tensor | None], tokens: TokenState, stream: str) -> None:
        super().__init__(items)
        self._tokens, self.stream = tokens, stream

    def with_items(self, items: Sequence[Tensor | None]) -> LocalResiduals:
        """Return others of the same stream."""
        return LocalResiduals(items, self._tokens, self.stream)

    def __getitem__(self, index: int) -> Tensor | None:
        return self._local(super().__getitem__(index))

    def pop(self, index: int = -1) -> Tensor | None:
        return self._local(super().pop(index))

    def _local(self, residual: Tensor | None) -> Tensor | None:
        if residual is None or not self._tokens.is_sharded(self.stream):
            return residual
        ((start, stop),) = self._tokens.spans((self.stream,), self._tokens.rank)
        covered = residual.shape[1]
        return residual[:, min(start, covered) : min(stop, covered)]
