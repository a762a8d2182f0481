"""All-gather sharded tokens inside a forward, and shard the result again: for code that needs full tokens.

Everything here is collective: all ranks must make the same calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .collectives import all_gather
from .plan import Aligned, FullAttention
from .tokens import TokenState


def gather(tokens: TokenState, value: Tensor, rule: Aligned) -> Tensor:
    """Return `value` with the full tokens of the rule's streams along its `dim`, one stream after the other.

    (..., S_LOCAL, ...) -> (..., S, ...), of the same dtype. A value whose streams are not sharded is returned as is.
    """
    if not _is_sharded(tokens, rule):
        return value
    sizes = [tokens.sizes(name) for name in rule.streams]
    own = tokens.without_placeholders(value, rule.streams, rule.dim)
    shards = own.split([size[tokens.rank] for size in sizes], rule.dim)
    full = [all_gather(shard, size, rule.dim, tokens.group) for shard, size in zip(shards, sizes, strict=True)]
    return torch.cat(full, rule.dim)


def shard(tokens: TokenState, value: Tensor, rule: Aligned) -> Tensor:
    """Invert `gather`: (..., S, ...) -> (..., S_LOCAL, ...)."""
    return tokens.shard(value, rule) if _is_sharded(tokens, rule) else value


@contextmanager
def full_attention(tokens: TokenState, replaces: bool = False) -> Iterator[None]:
    """Exchange nothing in attention calls of this context, which are over full tokens.

    With `replaces`, what runs in the context, by whatever means, is the attention of the enclosing module.
    """
    if replaces:
        tokens.count_full_attention()
    tokens.push(FullAttention())
    try:
        yield
    finally:
        tokens.pop()


def _is_sharded(tokens: TokenState, rule: Aligned) -> bool:
    return all(tokens.is_sharded(name) for name in rule.streams)
