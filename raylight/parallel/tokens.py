"""Where the tokens of one forward are: which streams are cut, how, and what is aligned with them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .partition import Pieces, deal
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


@dataclass(slots=True)
class Scope:
    """A module being run: what the plan says of its attention, and the calls of each kind that were made so far."""

    rule: Attention | GatherAround
    calls: dict[SelfAttention, int] = field(default_factory=dict)


class TokenState:
    """Token bookkeeping of rank `rank` of the `degree` ranks of `group` that split a sequence.

    Streams are cut when they are first met after `begin`, so every size is known on every rank
    without being exchanged. A stream may have fewer tokens than there are ranks: some then hold a stand-in (`Pieces`),
    which counts where tensors of this rank are meant, and not among the `sizes` and `lengths` that ranks exchange.
    `patched` are the kinds of patches that this forward calls.
    """

    def __init__(self, rank: int, degree: int, group: dist.ProcessGroup | None = None) -> None:
        self.use_group(rank, degree, group)

    def use_group(self, rank: int, degree: int, group: dist.ProcessGroup | None) -> None:
        """From the next forward on, split among these ranks; a degree of 1 leaves tokens whole."""
        self.rank = rank
        self.degree = degree
        self.group = group
        self.begin()

    def begin(self) -> None:
        """Forget the last forward, whether it ended or failed."""
        self._pieces: dict[str, Pieces] = {}
        self._left: set[str] = set()
        self._grids: dict[str, torch.Size] = {}
        self.patched: frozenset[str] = frozenset()
        self._scopes: list[Scope] = []
        self._cache: dict[Hashable, tuple[Tensor, Tensor]] = {}

    @property
    def is_split(self) -> bool:
        """Whether some stream is local at this point of the forward."""
        return len(self._pieces) > len(self._left)

    def is_sharded(self, stream: str) -> bool:
        """Whether `stream` is local at this point of the forward."""
        return stream in self._pieces and stream not in self._left

    def total(self, streams: Sequence[str]) -> int:
        """Tokens of `streams` over all ranks."""
        return sum(sum(self.sizes(name)) for name in streams)

    def lengths(self, streams: Sequence[str]) -> list[int]:
        """Tokens of `streams` together on each rank."""
        return [sum(self.sizes(name)[rank] for name in streams) for rank in range(self.degree)]

    def sizes(self, stream: str) -> tuple[int, ...]:
        """Tokens of one stream on each rank."""
        return self._of(stream).sizes

    def held(self, streams: Sequence[str]) -> int:
        """Tokens of `streams` together in this rank's tensors."""
        return sum(stop - start for start, stop in self.spans(streams, self.rank))

    def spans(self, streams: Sequence[str], rank: int) -> list[tuple[int, int]]:
        """`(start, stop)` of the tokens of each stream in `rank`'s tensors, with the whole streams laid end to end."""
        result, base = [], 0
        for name in streams:
            pieces = self._of(name)
            start, stop = pieces.held[rank]
            result.append((base + start, base + stop))
            base += pieces.total
        return result

    def own(self, local: Tensor, streams: Sequence[str], dim: int) -> Tensor:
        """A tensor of this rank without its stand-ins: what it has to exchange."""
        if not any(self._of(name).lent(self.rank) for name in streams):
            return local
        return torch.cat(
            [piece.narrow(dim, 0, self.sizes(name)[self.rank]) for name, piece in self._apart(local, streams, dim)], dim
        )

    def filled(self, own: Tensor, streams: Sequence[str], dim: int) -> Tensor:
        """The inverse of `own`, with zeros for stand-ins."""
        if not any(self._of(name).lent(self.rank) for name in streams):
            return own
        parts = []
        for name, piece in zip(streams, own.split([self.sizes(name)[self.rank] for name in streams], dim), strict=True):
            shape = list(own.shape)
            shape[dim] = self._of(name).lent(self.rank)
            parts += [piece, own.new_zeros(shape)]
        return torch.cat(parts, dim)

    def _apart(self, local: Tensor, streams: Sequence[str], dim: int) -> list[tuple[str, Tensor]]:
        lengths = [stop - start for start, stop in self.spans(streams, self.rank)]
        return list(zip(streams, local.split(lengths, dim), strict=True))

    def _of(self, stream: str) -> Pieces:
        if stream not in self._pieces:
            raise RuntimeError(f"token stream '{stream}' is used before the model handed it to a block")
        return self._pieces[stream]

    def mark_gathered(self, stream: str) -> None:
        self._left.add(stream)

    def on_grid(self, whole: Tensor, stream: str, dim: int) -> Tensor:
        """A stream that was joined along `dim`, with its tokens where they lay before it was cut."""
        grid = self._grids.get(stream)
        return whole if grid is None else whole.reshape(*whole.shape[:dim], *grid, *whole.shape[dim + len(grid) :])

    def push(self, rule: Attention | GatherAround) -> None:
        self._scopes.append(Scope(rule))

    def pop(self) -> Scope:
        return self._scopes.pop()

    @property
    def scope(self) -> Attention | GatherAround | None:
        """What the innermost module being run says of its attention calls."""
        return self._scopes[-1].rule if self._scopes else None

    def count(self, kind: SelfAttention) -> None:
        """An attention call of the innermost module being run, over the tokens of all ranks."""
        calls = self._scopes[-1].calls
        calls[kind] = calls.get(kind, 0) + 1

    def count_whole(self) -> None:
        """Attention over whole tokens, which stands for every call of the module around it."""
        around = next((scope for scope in reversed(self._scopes) if not isinstance(scope.rule, FullAttention)), None)
        if around is not None and not isinstance(around.rule, GatherAround):
            around.calls.update(
                {kind: kind.calls for kind in alternatives(around.rule) if isinstance(kind, SelfAttention)}
            )

    def shard(self, value: Any, rule: Input) -> Any:
        """This rank's part of an argument."""
        if value is None:
            return None
        if isinstance(rule, Unsupported):
            raise ValueError(f"this model cannot be split over workers here: {rule.reason}")
        if isinstance(rule, (TokenRanges, TokenIndex, Aligned)) and self._has_left_all(rule):
            return value
        if isinstance(rule, TokenRanges):
            return self._ranges(value, rule)
        if isinstance(rule, TokenPrefix):
            self._pieces[rule.name] = self._of(rule.stream).prefix(value)
            return self.held((rule.name,))
        if isinstance(rule, TokenIndex):
            ((start, stop),) = self.spans((rule.stream,), self.rank)
            return min(max(value, start), stop) - start
        if isinstance(rule, Converted):
            return rule.convert(value, self)
        if isinstance(rule, Stream):
            if rule.index is None:
                return self._cut(value, rule)
            return (*value[: rule.index], self._cut(value[rule.index], rule), *value[rule.index + 1 :])
        if isinstance(rule, Control):
            return {name: LocalResiduals(items, self, rule.stream) for name, items in value.items()}
        if isinstance(value, Mapping):
            return {key: self.shard(item, rule) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.shard(item, rule) for item in value)
        if not isinstance(value, Tensor):
            return value
        key = (id(value), rule)
        if key not in self._cache:
            # The original is kept beside its part so that its id cannot be reused within the forward.
            self._cache[key] = (value, self._align(value, rule))
        return self._cache[key][1]

    def _has_left_all(self, rule: TokenRanges | TokenIndex | Aligned) -> bool:
        streams = (rule.stream,) if isinstance(rule, TokenIndex) else rule.streams
        return all(name in self._left for name in streams)

    def _cut(self, value: Tensor, rule: Stream) -> Tensor:
        if self.is_sharded(rule.name):
            # A model may use the whole stream twice before it goes on with its local output.
            whole = rule.grid == 1 and not rule.after and value.shape[rule.dim] == self.total((rule.name,))
            return self.part(value, rule.name, rule.dim) if whole else value
        if rule.after:
            before = self.held(rule.after)
            head, tail = value.split([before, value.shape[rule.dim] - before], rule.dim)
            return torch.cat([head, self._cut(tail, replace(rule, after=()))], rule.dim)
        if rule.grid > 1:
            self._grids[rule.name] = value.shape[rule.dim : rule.dim + rule.grid]
            value = value.flatten(rule.dim, rule.dim + rule.grid - 1)
            value = value.reshape(*value.shape[: rule.dim + 1], *[1] * (rule.grid - 1), *value.shape[rule.dim + 1 :])
        total = value.shape[rule.dim]
        known = self._pieces.get(rule.name)
        if known is None or known.total != total:
            if known is not None:
                self._cache.clear()
            self._pieces[rule.name] = deal(
                total, self.lengths([name for name in self._pieces if self.is_sharded(name)])
            )
        self._left.discard(rule.name)
        return self.part(value, rule.name, rule.dim)

    def part(self, value: Tensor, stream: str, dim: int) -> Tensor:
        """This rank's tokens of a whole stream, as it holds them."""
        ((start, stop),) = self.spans((stream,), self.rank)
        # A copy: blocks add to their input in place, and the whole stream can be freed.
        return value.narrow(dim, start, stop - start).clone()

    def _align(self, value: Tensor, rule: Aligned) -> Tensor:
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
        # Rows that do not divide the tokens are repeated once more and the last of them cut short.
        repeats = -(-total // rows)
        index = torch.cat([torch.arange(start, stop, device=value.device) for start, stop in spans])
        return value.index_select(rule.dim, index // repeats)

    def _ranges(self, value: Sequence[Sequence[int]], rule: TokenRanges) -> list[tuple[int, ...]]:
        pieces, base, local_base = [], 0, 0
        for name in rule.streams:
            start, stop = self._of(name).held[self.rank]
            length = stop - start
            start = base + (0 if name in rule.local else start)
            pieces.append((start, start + length, local_base))
            base += length if name in rule.local else self._of(name).total
            local_base += length
        result = []
        for start, stop, *rest in value:
            for low, high, local in pieces:
                first, last = max(start, low), high if stop is None else min(stop, high)
                if first < last:
                    result.append((first - low + local, last - low + local, *rest))
        return result

    def local_mask_rows(self, mask: Tensor, streams: Sequence[str]) -> Tensor:
        """The rows of a mask (B|1, H|1, Sq|1, Sk) that belong to this rank's queries."""
        if mask.shape[-2] == 1:
            return mask
        return torch.cat([mask[..., start:stop, :] for start, stop in self.spans(streams, self.rank)], dim=-2)

    def gathered_mask(self, mask: Tensor, streams: Sequence[str]) -> Tensor:
        """A mask (B|1, H|1, Sq|1, Sk) in the order in which an all-to-all gathers the ranks' tokens.

        Each rank holds `[txt_r, img_r]`, so gathered tokens come rank by rank and not stream by stream.
        """
        total = self.total(streams)
        if mask.shape[-1] != total or mask.shape[-2] not in (1, total):
            raise RuntimeError(f"an attention mask of shape {tuple(mask.shape)} does not fit {total} tokens")
        key = (id(mask), tuple(streams))
        if key not in self._cache:
            order = torch.cat(
                [
                    torch.arange(start, start + self.sizes(name)[rank], device=mask.device)
                    for rank in range(self.degree)
                    for name, start in self._starts(streams, rank)
                ]
            )
            permuted = mask.index_select(-1, order)
            self._cache[key] = (mask, permuted if mask.shape[-2] == 1 else permuted.index_select(-2, order))
        return self._cache[key][1]

    def _starts(self, streams: Sequence[str], rank: int) -> list[tuple[str, int]]:
        """Where rank's tokens of each stream start, with the whole streams laid end to end."""
        return [(name, start) for name, (start, _) in zip(streams, self.spans(streams, rank), strict=True)]


class LocalResiduals(list):
    """A list of residuals (B, tokens, width) whose entries are this rank's rows while the stream is local: the model
    adds them to its tokens.

    A residual may cover only the first tokens of its stream; so does its part.
    """

    def __init__(self, items: Sequence[Tensor | None], tokens: TokenState, stream: str) -> None:
        super().__init__(items)
        self._tokens, self._stream = tokens, stream

    def __getitem__(self, index: int) -> Tensor | None:
        return self._local(super().__getitem__(index))

    def pop(self, index: int = -1) -> Tensor | None:
        return self._local(super().pop(index))

    def _local(self, residual: Tensor | None) -> Tensor | None:
        if residual is None or not self._tokens.is_sharded(self._stream):
            return residual
        ((start, stop),) = self._tokens.spans((self._stream,), self._tokens.rank)
        rows = residual.shape[1]
        return residual[:, min(start, rows) : min(stop, rows)]
