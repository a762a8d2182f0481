"""Local tokens made whole and whole tokens made local, in the middle of a forward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .collectives import all_gather
from .plan import Aligned, FullAttention
from .tokens import TokenState


class FullTokens:
    """For code that was written for whole tokens and runs where they are split. Every rank must make the same calls."""

    def __init__(self, tokens: TokenState) -> None:
        self._tokens = tokens

    @property
    def is_split(self) -> bool:
        return self._tokens.is_split

    @property
    def is_shared(self) -> bool:
        """Whether this forward's tokens are split at all."""
        return self._tokens.degree > 1

    def expect(self, kinds: Iterable[str]) -> None:
        """Say at the start of a forward which kinds of patches it will call."""
        self._tokens.patched = frozenset(kinds)

    def total(self, streams: Sequence[str]) -> int:
        """Tokens of `streams` over all ranks."""
        return self._tokens.total(streams)

    def join(self, value: Tensor, rule: Aligned) -> Tensor:
        """All tokens of the rule's streams, each stream whole, one after the other. Collective."""
        if not self._is_split(rule):
            return value
        sizes = [self._tokens.sizes(name) for name in rule.streams]
        own = self._tokens.own(value, rule.streams, rule.dim)
        pieces = own.split([size[self._tokens.rank] for size in sizes], rule.dim)
        whole = [
            all_gather(piece, size, rule.dim, self._tokens.group) for piece, size in zip(pieces, sizes, strict=True)
        ]
        return torch.cat(whole, rule.dim)

    def cut(self, value: Tensor, rule: Aligned) -> Tensor:
        """The inverse of `join`."""
        return self._tokens.shard(value, rule) if self._is_split(rule) else value

    @contextmanager
    def local_attention(self, replaces: bool = False) -> Iterator[None]:
        """Attention calls in this context are over whole tokens: they exchange nothing. With `replaces`, what is done
        in it, by whatever means, is the attention of the module around it."""
        if replaces:
            self._tokens.count_whole()
        self._tokens.push(FullAttention())
        try:
            yield
        finally:
            self._tokens.pop()

    def _is_split(self, rule: Aligned) -> bool:
        return all(self._tokens.is_sharded(name) for name in rule.streams)
