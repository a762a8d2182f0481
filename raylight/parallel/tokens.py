"""Where the tokens of one forward are: which streams are cut, how, and what is aligned with them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .partition import offsets, partition
from .plan import (
    Aligned,
    Attention,
    Control,
    Converted,
    Input,
    Refused,
    SelfAttention,
    Stream,
    TokenIndex,
    TokenPrefix,
    TokenRanges,
    Whole,
    WholeAttention,
    alternatives,
)


@dataclass(slots=True)
class Scope:
    """A module being run: what the plan says of its attention, and the calls of each kind that were made so far."""

    rule: Attention | Whole
    calls: dict[SelfAttention, int] = field(default_factory=dict)


class TokenState:
    """Token bookkeeping of rank `rank` of the `degree` ranks of `group` that split a sequence.

    Streams are cut when they are first met after `begin`, so every size is known on every rank
    without being exchanged. `patched` are the kinds of patches that this forward calls.
    """

    def __init__(self, rank: int, degree: int, group: dist.ProcessGroup | None = None) -> None:
        self.share(rank, degree, group)

    def share(self, rank: int, degree: int, group: dist.ProcessGroup | None) -> None:
        """From the next forward on, split among these ranks; a degree of 1 leaves tokens whole."""
        self.rank = rank
        self.degree = degree
        self.group = group
        self.begin()

    def begin(self) -> None:
        """Forget the last forward, whether it ended or failed."""
        self._sizes: dict[str, tuple[int, ...]] = {}
        self._left: set[str] = set()
        self._grids: dict[str, torch.Size] = {}
        self.patched: frozenset[str] = frozenset()
        self._scopes: list[Scope] = []
        self._cache: dict[Hashable, tuple[Tensor, Tensor]] = {}

    @property
    def is_cut(self) -> bool:
        """Whether some stream is local at this point of the forward."""
        return len(self._sizes) > len(self._left)

    def is_open(self, stream: str) -> bool:
        """Whether `stream` is local at this point of the forward."""
        return stream in self._sizes and stream not in self._left

    def total(self, streams: Sequence[str]) -> int:
        """Tokens of `streams` over all ranks."""
        return sum(sum(self.sizes(name)) for name in streams)

    def lengths(self, streams: Sequence[str]) -> list[int]:
        """Tokens of `streams` together on each rank."""
        return [sum(self.sizes(name)[rank] for name in streams) for rank in range(self.degree)]

    def sizes(self, stream: str) -> tuple[int, ...]:
        """Tokens of one stream on each rank."""
        if stream not in self._sizes:
            raise RuntimeError(f"token stream '{stream}' is used before the model handed it to a block")
        return self._sizes[stream]

    def spans(self, streams: Sequence[str], rank: int) -> list[tuple[int, int]]:
        """`(start, stop)` of `rank`'s tokens of each stream, with the whole streams laid end to end."""
        result, base = [], 0
        for name in streams:
            sizes = self.sizes(name)
            start = base + offsets(sizes)[rank]
            result.append((start, start + sizes[rank]))
            base += sum(sizes)
        return result

    def leave(self, stream: str) -> None:
        self._left.add(stream)

    def on_grid(self, whole: Tensor, stream: str, dim: int) -> Tensor:
        """A stream that was joined along `dim`, with its tokens where they lay before it was cut."""
        grid = self._grids.get(stream)
        return whole if grid is None else whole.reshape(*whole.shape[:dim], *grid, *whole.shape[dim + len(grid):])

    def push(self, rule: Attention | Whole) -> None:
        self._scopes.append(Scope(rule))

    def pop(self) -> Scope:
        return self._scopes.pop()

    @property
    def scope(self) -> Attention | Whole | None:
        """What the innermost module being run says of its attention calls."""
        return self._scopes[-1].rule if self._scopes else None

    def count(self, kind: SelfAttention) -> None:
        """An attention call of the innermost module being run, over the tokens of all ranks."""
        calls = self._scopes[-1].calls
        calls[kind] = calls.get(kind, 0) + 1

    def count_whole(self) -> None:
        """Attention over whole tokens, which stands for every call of the module around it."""
        around = next((scope for scope in reversed(self._scopes) if not isinstance(scope.rule, WholeAttention)), None)
        if around is not None and not isinstance(around.rule, Whole):
            around.calls.update({kind: kind.calls for kind in alternatives(around.rule)
                                 if isinstance(kind, SelfAttention)})

    def localize(self, value: Any, rule: Input) -> Any:
        """This rank's part of an argument."""
        if value is None:
            return None
        if isinstance(rule, Refused):
            raise ValueError(f"this model cannot be split over workers here: {rule.reason}")
        if isinstance(rule, (TokenRanges, TokenIndex, Aligned)) and self._has_left_all(rule):
            return value
        if isinstance(rule, TokenRanges):
            return self._ranges(value, rule)
        if isinstance(rule, TokenPrefix):
            sizes = self.sizes(rule.stream)
            self._sizes[rule.name] = tuple(min(max(value - start, 0), size)
                                           for start, size in zip(offsets(sizes), sizes, strict=True))
            return self._sizes[rule.name][self.rank]
        if isinstance(rule, TokenIndex):
            (start, stop), = self.spans((rule.stream,), self.rank)
            return min(max(value, start), stop) - start
        if isinstance(rule, Converted):
            return rule.convert(value, self)
        if isinstance(rule, Stream):
            if rule.index is None:
                return self._cut(value, rule)
            return (*value[:rule.index], self._cut(value[rule.index], rule), *value[rule.index + 1:])
        if isinstance(rule, Control):
            return {name: LocalResiduals(items, self, rule.stream) for name, items in value.items()}
        if isinstance(value, Mapping):
            return {key: self.localize(item, rule) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.localize(item, rule) for item in value)
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
        if self.is_open(rule.name):
            # A model may use the whole stream twice before it goes on with its local output.
            whole = rule.grid == 1 and not rule.after and value.shape[rule.dim] == self.total((rule.name,))
            return self.part(value, rule.name, rule.dim) if whole else value
        if rule.after:
            before = self.lengths(rule.after)[self.rank]
            head, tail = value.split([before, value.shape[rule.dim] - before], rule.dim)
            return torch.cat([head, self._cut(tail, replace(rule, after=()))], rule.dim)
        if rule.grid > 1:
            self._grids[rule.name] = value.shape[rule.dim:rule.dim + rule.grid]
            value = value.flatten(rule.dim, rule.dim + rule.grid - 1)
            value = value.reshape(*value.shape[:rule.dim + 1], *[1] * (rule.grid - 1), *value.shape[rule.dim + 1:])
        total = value.shape[rule.dim]
        if total < self.degree:
            raise ValueError(
                f"the '{rule.name}' sequence has {total} tokens, too few for {self.degree} ranks: "
                f"choose a sequence degree of at most {total}"
            )
        sizes = partition(total, self.degree)
        if self._sizes.get(rule.name, sizes) != sizes:
            self._cache.clear()
        self._sizes[rule.name] = sizes
        self._left.discard(rule.name)
        return self.part(value, rule.name, rule.dim)

    def part(self, value: Tensor, stream: str, dim: int) -> Tensor:
        """This rank's tokens of a whole stream."""
        (start, stop), = self.spans((stream,), self.rank)
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
            sizes = self.sizes(name)
            start = base + (0 if name in rule.local else offsets(sizes)[self.rank])
            pieces.append((start, start + sizes[self.rank], local_base))
            base += sizes[self.rank] if name in rule.local else sum(sizes)
            local_base += sizes[self.rank]
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
            order = torch.cat([
                torch.arange(start, stop, device=mask.device)
                for rank in range(self.degree) for start, stop in self.spans(streams, rank)
            ])
            permuted = mask.index_select(-1, order)
            self._cache[key] = (mask, permuted if mask.shape[-2] == 1 else permuted.index_select(-2, order))
        return self._cache[key][1]


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
        if residual is None or not self._tokens.is_open(self._stream):
            return residual
        (start, stop), = self._tokens.spans((self._stream,), self._tokens.rank)
        rows = residual.shape[1]
        return residual[:, min(start, rows):min(stop, rows)]
