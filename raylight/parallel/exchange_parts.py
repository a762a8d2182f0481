"""The parts of one Ulysses exchange with all of their sizes, computed once for all calls of the same sizes.

Shapes as in `ulysses`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .collectives import Splits
from .exchange_layout import Chunk, HeadRange, head_chunks, pack_heads, unpack_heads
from .sequence_attention import Kernel
from .shares import Weights

Sizes = tuple[int, int, int, int, int, int, int]  # B, H, HKV, D of q, of k and of v, bytes of an element


@dataclass(frozen=True, slots=True)
class Part:
    """One chunk of heads, on one rank. Its buffers are exchanged in words of 8 bytes if D allows it (`in_words`)."""

    chunk: Chunk
    batch: int
    total: int  # S
    own: HeadRange
    own_keys: HeadRange
    widths: tuple[tuple[int, int], ...]  # heads and D of q, k and v on this rank
    group: int  # query heads per key head
    in_words: bool
    heads: Splits  # of queries, keys and values, in words or elements
    tokens: Splits  # of what attention returns
    result: tuple[int, int, int, int]  # (B, S_LOCAL, H, D), with all heads

    def pack(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return what is sent of q (B, H, S_LOCAL, D), k and v (B, HKV, S_LOCAL, D), by ranks."""
        return self.words(pack_heads((q, k, v), (self.chunk.queries, self.chunk.keys, self.chunk.keys)))

    def words(self, buffer: Tensor) -> Tensor:
        """Return a contiguous buffer as it is exchanged."""
        return buffer.view(torch.int64) if self.in_words else buffer

    def attend(self, kernel: Kernel, received: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """Attend with what was received, (S, B, (H_LOCAL + 2 * HKV_LOCAL) * D), flat. Return (B, H_LOCAL, S, D)."""
        # (S, B, ...) -> q (B, H_LOCAL, S, D), k, v (B, HKV_LOCAL, S, D): views
        q, k, v = unpack_heads(received, self.total, self.batch, self.widths)
        (start, stop), first = self.own, self.own_keys[0]
        if start % self.group or stop % self.group:  # a group of query heads is on two ranks: one key head for each
            index = torch.arange(start, stop, device=k.device) // self.group - first
            k, v = (t.index_select(1, index) for t in (k, v))
        # (B, H, S|1, S) -> (B, H_LOCAL, S|1, S)
        return kernel(q, k, v, mask if mask is None or mask.shape[1] == 1 else mask[:, start:stop], scale)


@functools.lru_cache(maxsize=256)
def exchange_parts(
    sizes: Sizes, lengths: tuple[int, ...], rank: int, large_bytes: int, chunks: int, weights: Weights = ()
) -> tuple[Part, ...]:
    """Return the parts of an exchange among ranks with `lengths` tokens, in order: `chunks` at most, if a rank receives
    at least `large_bytes` (on average), else one. Heads are divided by `weights`.

    The number of parts is the same on every rank, since it depends on the tokens of all.
    """
    batch, heads, kv_heads, q_width, k_width, v_width, itemsize = sizes
    degree, total = len(lengths), sum(lengths)
    width = heads * q_width + kv_heads * (k_width + v_width)
    is_large = batch * total * width * itemsize // degree >= large_bytes
    group = heads // kv_heads
    per_word = 8 // itemsize
    in_words = per_word > 1 and all(width % per_word == 0 for width in (q_width, k_width, v_width))
    per_word = per_word if in_words else 1
    parts = []
    for chunk in head_chunks(heads, group, degree, chunks if is_large else 1, weights):
        of_ranks = [  # elements of a token for each rank
            batch * ((stop - start) * q_width + (last - first) * (k_width + v_width)) // per_word
            for (start, stop), (first, last) in zip(chunk.queries, chunk.keys, strict=True)
        ]
        back = [batch * (stop - start) * v_width // per_word for start, stop in chunk.queries]
        equal = len(set(lengths)) == 1 and len(set(of_ranks)) == 1
        sent = tuple(lengths[rank] * elements for elements in of_ranks)
        received = tuple(length * of_ranks[rank] for length in lengths)
        returned = tuple(length * back[rank] for length in lengths)
        arriving = tuple(lengths[rank] * elements for elements in back)
        (start, stop), (first, last) = chunk.queries[rank], chunk.keys[rank]
        parts.append(
            Part(
                chunk=chunk,
                batch=batch,
                total=total,
                own=(start, stop),
                own_keys=(first, last),
                widths=((stop - start, q_width), (last - first, k_width), (last - first, v_width)),
                group=group,
                in_words=in_words,
                heads=Splits(sent, received, equal),
                tokens=Splits(returned, arriving, equal and len(set(back)) == 1),
                result=(batch, lengths[rank], heads, v_width),
            )
        )
    return tuple(parts)
