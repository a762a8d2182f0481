"""Drafts of a plan from the record of one forward.

Each list of blocks is split by itself: its streams are sharded where they enter and gathered after its last block, or
after each of its blocks (`per_block`), so that all other code of the model has full tokens. What one forward cannot
tell is guessed in several ways, as several drafts. A draft is only used where it is proven.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from raylight.parallel.plan import (
    Aligned,
    Attention,
    CrossAttention,
    Dropped,
    FullAttention,
    Gather,
    GatherAround,
    Gathered,
    Input,
    SelfAttention,
    SequencePlan,
    Stream,
    TokenIndex,
    TokenRanges,
)

from .record import AttentionCall, Call, Record, within
from .tokens import Tokens, find_streams, joined, place_of

# A list of blocks over fewer tokens than this share of the longest sequence is not worth its exchanges.
_WORTH = 0.4


class Undrafted(ValueError):
    """A model for which no plan can be drafted; the message says why."""


class Guess(NamedTuple):
    """What one forward does not tell: whether code between blocks needs full tokens, whether fewer rows than tokens are
    repeated for them, whether masks are compared with a rank's own tokens, whether numbers are positions of tokens, and
    whether joined streams come in the reverse order of the block's arguments.
    """

    per_block: bool = False
    expand: bool = False
    masks: bool = False
    numbers: bool = False
    reverse: bool = False


_GUESSES = sorted((Guess(*flags) for flags in itertools.product((False, True), repeat=5)), key=sum)


def drafts(name: str, record: Record) -> list[SequencePlan]:
    """Return different drafts of a plan for the model class `name`, the fastest first.

    Raises Undrafted: when the forward shows no list of blocks whose streams and attention a plan can describe.
    """
    found: list[SequencePlan] = []
    reason = ""
    for guess in _GUESSES:
        try:
            plan = _Draft(record, guess).plan(name)
        except Undrafted as error:
            reason = str(error)
        else:
            if plan not in found:
                found.append(plan)
    if not found:
        raise Undrafted(reason)
    return found


@dataclass
class _Blocks:
    """One list of blocks to be split: its called blocks by path, and the streams of the first one."""

    pattern: str
    paths: list[str]
    calls: dict[str, Call]
    streams: list[Tokens]
    per_block: bool


class _Draft:
    """One draft."""

    def __init__(self, record: Record, guess: Guess) -> None:
        self._record, self._guess = record, guess
        self._inputs: dict[str, dict[str | int, Input]] = {}
        self._attention: dict[str, Attention] = {}
        self._outputs: dict[str, Any] = {}

    def plan(self, name: str) -> SequencePlan:
        lists = self._lists()
        for blocks in lists:
            for path in blocks.calls:
                self._describe(blocks, path)
        heads = min(
            call.heads
            for call in self._record.attention
            if any(within(call.path, path) for blocks in lists for path in blocks.paths)
        )
        return SequencePlan(
            model=name,
            inputs=self._folded(lists, {path: rules for path, rules in self._inputs.items() if rules}),
            attention=self._folded(lists, self._attention),
            outputs=self._outputs,
            heads=heads,
        )

    def _lists(self) -> list[_Blocks]:
        """Return the lists of blocks that are worth splitting."""
        record, found = self._record, []
        lengths = {
            pattern: [call.queries for call in self._self_calls(paths)] for pattern, paths in record.lists.items()
        }
        longest = max((length for of_list in lengths.values() for length in of_list), default=0)
        if longest < 2:
            raise Undrafted("no block of it calls ComfyUI's attention over its tokens")
        for pattern, paths in record.lists.items():
            if max(lengths[pattern], default=0) < _WORTH * longest:
                continue
            calls = {path: record.calls[path] for path in record.calls if path in paths}
            streams = find_streams(next(iter(calls.values())), lengths[pattern], f"{pattern.partition('.*')[0]}.")
            if streams:
                found.append(_Blocks(pattern, paths, calls, streams, self._guess.per_block))
        if not found:
            raise Undrafted("no block gets and returns the tokens that its attention is over")
        self._mark_interleaved(found)
        return found

    def _mark_interleaved(self, lists: list[_Blocks]) -> None:
        """Gather after each block where blocks of several lists take turns."""
        owner = {path: blocks for blocks in lists for path in blocks.paths}
        order = [owner[path] for path in self._record.calls if path in owner]
        turns = [blocks for index, blocks in enumerate(order) if index == 0 or order[index - 1] is not blocks]
        for blocks in lists:
            if sum(turn is blocks for turn in turns) > 1:
                start, stop = order.index(blocks), len(order) - order[::-1].index(blocks)
                for one in order[start:stop]:
                    one.per_block = True

    def _self_calls(self, paths: Sequence[str]) -> Iterator[AttentionCall]:
        for call in self._record.attention:
            if call.queries == call.keys and any(within(call.path, path) for path in paths):
                yield call

    def _describe(self, blocks: _Blocks, path: str) -> None:
        call, streams = blocks.calls[path], blocks.streams
        rules = self._inputs.setdefault(path, {})
        for stream in streams:
            root, index = _root(stream.place)
            if stream.place in call.inputs:
                rules[root] = Stream(stream.name, stream.dim, index, stream.grid)
        for root in dict.fromkeys(_root(place)[0] for place in (*call.inputs, *call.numbers)):
            if root not in rules and (rule := self._aligned(blocks, call, root)) is not None:
                rules[root] = rule
        self._attend(blocks, path)
        if blocks.per_block or path == list(blocks.calls)[-1]:
            self._outputs[path] = self._gathers(blocks, path)

    def _gathers(self, blocks: _Blocks, path: str) -> tuple[Gather | Dropped, ...]:
        call, taken, found = blocks.calls[path], set(), []
        for stream in blocks.streams:
            shape = call.inputs.get(stream.place)
            place = place_of(call, shape, taken) if shape is not None else None
            if place is None:
                found.append(Dropped(stream.name))
                continue
            taken.add(place)
            found.append(Gather(stream.name, stream.dim, _index(place)))
        # Other outputs with as many tokens belong to the first stream: blocks may return one for later use.
        first = blocks.streams[0]
        for place, shape in call.outputs.items():
            if place not in taken and shape == call.inputs.get(first.place):
                found.append(Gather(first.name, first.dim, _index(place)))
        return tuple(found)

    def _aligned(self, blocks: _Blocks, call: Call, root: str | int) -> Input | None:
        """Return the rule of an argument that has rows for tokens, None if it stays as it is."""
        if root in call.numbers:
            return self._positions(blocks, str(root), call.numbers[root])
        shapes = [shape for place, shape in call.inputs.items() if _root(place)[0] == root]
        carried = any(place in call.carried for place in call.inputs if _root(place)[0] == root)
        if carried and not blocks.per_block:
            return None  # an output of an earlier block, which is local
        found = [self._rows(blocks, shape) for shape in shapes]
        known = [rule for rule in found if rule is not None]
        return known[0] if known and all(rule in (known[0], None) for rule in found) else None

    def _rows(self, blocks: _Blocks, shape: tuple[int, ...]) -> Aligned | None:
        streams, last = blocks.streams, len(shape) - 1
        dims = sorted(range(len(shape)), key=lambda dim: (dim == 0, dim))
        inner = [dim for dim in dims if dim != last or (len(shape) == 2 and self._guess.masks)]
        for dim in inner:
            names = joined(streams, shape[dim], self._guess.reverse) if shape[dim] > 1 else None
            if names is not None and not _is_mask(shape, dim):
                return Aligned(names, dim)
        if self._guess.masks and len(shape) == 4 and shape[1:3] == (1, 1):
            names = joined(streams, shape[-1], self._guess.reverse)
            return None if names is None else Aligned(names, dim=3)
        if self._guess.expand and len(shape) > 2 and 1 < shape[1] < streams[0].count:
            fits = streams[0].count % shape[1] == 0
            others = {call.keys for call in self._record.attention if call.keys != call.queries}
            if fits and shape[1] not in others:
                return Aligned((streams[0].name,), expand=True)
        return None

    def _positions(self, blocks: _Blocks, name: str, value: Any) -> TokenIndex | TokenRanges | None:
        """Return the rule of a number, or of a list of (start, stop, ...), that may count tokens."""
        first = blocks.streams[0]
        if isinstance(value, int):
            return TokenIndex(first.name) if self._guess.numbers and 0 < value < first.count else None
        if not all(isinstance(one, (list, tuple)) and len(one) > 1 for one in value):
            return None
        stops = [one[1] for one in value]
        names = joined(blocks.streams, stops[-1] or 0, self._guess.reverse)
        if names is None:
            named = [one for one in blocks.streams if name.endswith(one.place)]
            streams = named or (blocks.streams[::-1] if self._guess.reverse else blocks.streams)
            names = tuple(one.name for one in streams)
            if max(stop or 0 for stop in stops) > sum(one.count for one in streams):
                return None
        return TokenRanges(names)

    def _attend(self, blocks: _Blocks, path: str) -> None:
        """Describe the attention calls of a block, and what else mixes tokens in it."""
        # A dict keeps their order, which has to be the same in all processes.
        around = dict.fromkeys(
            module
            for mixer in self._record.mixing
            if within(mixer, path) and (module := self._token_module(blocks, path, mixer)) is not None
        )
        calls = [call for call in self._record.attention if within(call.path, path)]
        for call in calls:
            if joined(blocks.streams, call.queries) is None:
                module = self._token_module(blocks, path, call.path)
                if module is not None:
                    around[module] = None
        for module in around:
            stream, root = self._stream_of(blocks, module)
            self._inputs[module] = {root: GatherAround(stream.name, stream.dim)}
        by_module: dict[str, list[AttentionCall]] = {}
        for call in calls:
            if not any(within(call.path, module) for module in around):
                by_module.setdefault(call.path, []).append(call)
        for module, made in by_module.items():
            self._attention[module] = self._rule(blocks, module, made)

    def _rule(self, blocks: _Blocks, module: str, made: Sequence[AttentionCall]) -> Attention:
        rules: dict[Any, int] = {}
        for call in made:
            queries = joined(blocks.streams, call.queries, self._guess.reverse)
            keys = joined(blocks.streams, call.keys, self._guess.reverse)
            if queries is not None:
                rule: Any = SelfAttention(queries) if call.queries == call.keys else CrossAttention(queries)
            else:
                rule = FullAttention()
                if keys is not None:
                    self._gather_keys(blocks, module, call.keys)
            rules[rule] = rules.get(rule, 0) + 1
        found = tuple(
            SelfAttention(rule.streams, calls=calls) if isinstance(rule, SelfAttention) else rule
            for rule, calls in rules.items()
        )
        if len(found) == 1:
            return found[0]
        if all(isinstance(rule, SelfAttention) for rule in found):
            return found
        raise Undrafted(f"{module} attends to its own tokens and to others")

    def _gather_keys(self, blocks: _Blocks, module: str, count: int) -> None:
        """Have a module whose queries are replicated get its keys, and what is aligned with them, in full."""
        stream = next((one for one in blocks.streams if one.count == count), None)
        if stream is None:
            raise Undrafted(f"{module} attends to several streams together with tokens of none")
        rules = self._inputs.setdefault(module, {})
        for place, shape in self._record.calls[module].inputs.items():
            aligned = self._rows(blocks, shape)
            if aligned is not None and aligned.streams == (stream.name,):
                rules[_root(place)[0]] = Gathered(stream.name, aligned.dim)

    def _token_module(self, blocks: _Blocks, block: str, path: str) -> str | None:
        """Return the innermost module in the block, from `path` outwards, that gets and returns a stream."""
        while path != block:
            if path in self._record.calls and self._stream_of(blocks, path) is not None:
                return path
            path = path.rpartition(".")[0]
        return None

    def _stream_of(self, blocks: _Blocks, module: str) -> Any:
        call = self._record.calls[module]
        for place, shape in call.inputs.items():
            for stream in blocks.streams:
                fits = stream.grid == 1 and len(shape) > stream.dim and shape[stream.dim] == stream.count
                if fits and shape == call.outputs.get(""):
                    return stream, _root(place)[0]
        return None

    def _folded(self, lists: Sequence[_Blocks], rules: dict[str, Any]) -> dict[str, Any]:
        """Write `blocks.*` where all blocks of a list have the same rule."""
        result = dict(rules)
        for blocks in lists:
            suffixes = dict.fromkeys(
                path.removeprefix(block) for path in rules for block in blocks.paths if within(path, block)
            )
            for suffix in suffixes:
                paths = [f"{block}{suffix}" for block in blocks.paths]
                if all(path in rules and rules[path] == rules[paths[0]] for path in paths) and len(paths) > 1:
                    for path in paths:
                        del result[path]
                    result[f"{blocks.pattern}{suffix}"] = rules[paths[0]]
        return result


def _root(place: str) -> tuple[str | int, int | None]:
    """Return the argument of a place, and the index in it if it is a tuple: `x[0]` is ("x", 0)."""
    root, _, rest = place.partition("[")
    index = re.fullmatch(r"(\d+)\]", rest)
    return int(root) if root.isdigit() else root, int(index[1]) if index else None


def _index(place: str) -> int | None:
    """Return the index of a place in an output. Raises Undrafted: it is deeper, or in a dict."""
    if place == "":
        return None
    index = re.fullmatch(r"\[(\d+)\]", place)
    if index is None:
        raise Undrafted(f"a block returns its tokens at {place}")
    return int(index[1])


def _is_mask(shape: tuple[int, ...], dim: int) -> bool:
    """Return whether a tensor is a mask of pairs of tokens, which attention takes in full."""
    return dim == len(shape) - 2 and shape[-1] == shape[-2]
