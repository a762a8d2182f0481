"""Ulysses attention: exchange tokens for heads, attend over the full sequence, and exchange back.

DeepSpeed Ulysses (Jacobs et al. 2023, arXiv 2309.14509), for any number of tokens, and of heads from one per rank:
shards are uneven instead of padded. Over slow links, a large exchange is made in two chunks of heads: one is sent while
attention of the other is computed.

Shapes: B batch rows, H heads, HKV key heads, D head size, S tokens on all ranks; S_LOCAL, H_LOCAL and HKV_LOCAL are
this rank's (of one chunk). Key heads are those that the rank's query heads need.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from . import bandwidth, shares
from .collectives import Splits, exchange, start_exchange
from .exchange_layout import pack_tokens, place_all_heads, place_heads
from .exchange_parts import Part, exchange_parts
from .sequence_attention import Kernel

CHUNKS = 2
# Measured over NVLink: what a chunk hides is less than what its kernels take from attention, at every size.
FAST_BYTES_PER_S = 80e9
LARGE_BYTES = 32 * 2**20  # received per rank; below it, launching everything twice costs more than it hides


class UlyssesAttention:
    """The exchange of one Ulysses group. Exchanges of at least `large_bytes` are made in `chunks`, by default in one if
    all its links are fast. If a ring joins it with other groups, `ring` is this rank's.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        large_bytes: int = LARGE_BYTES,
        chunks: int | None = None,
        ring: dist.ProcessGroup | None = None,
    ) -> None:
        self._group = group
        self._weights = shares.of_heads(group, ring)
        self._rank = dist.get_rank(group)
        self._degree = dist.get_world_size(group)
        self._large_bytes = large_bytes
        slowest = bandwidth.slowest_in_use(dist.get_process_group_ranks(group))
        usual = 1 if slowest >= FAST_BYTES_PER_S else CHUNKS
        self._chunks = usual if chunks is None else chunks

    def __call__(
        self,
        kernel: Kernel,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int],
        mask: Tensor | None,
        scale: float | None,
    ) -> Tensor:
        """As `Strategy`: q (B, H, S_LOCAL, D), k and v (B, HKV, S_LOCAL, D) -> (B, H, S_LOCAL, D).

        Raises ValueError: when there are fewer heads than ranks.
        """
        if self._degree == 1:
            return kernel(q, k, v, mask, scale)
        heads = q.shape[1]
        if heads < self._degree:
            raise ValueError(
                f"{heads} attention heads cannot be split over a Ulysses degree of {self._degree}: "
                f"choose a degree of at most {heads}"
            )
        parts = exchange_parts(
            (q.shape[0], heads, k.shape[1], q.shape[3], k.shape[3], v.shape[3], q.element_size()),
            tuple(lengths),
            self._rank,
            self._large_bytes,
            self._chunks,
            self._weights,
        )
        if len(parts) == 1:
            return self._at_once(kernel, q, k, v, parts[0], mask, scale)
        # q (B, H, S_LOCAL, D), k, v (B, HKV, S_LOCAL, D) -> (S, B, (H_LOCAL + 2 * HKV_LOCAL) * D), for each chunk
        qkv_exchanges = [self._start(part.pack(q, k, v), part.heads) for part in parts]
        out_exchanges = []
        for part, (received, work) in zip(parts, qkv_exchanges, strict=True):
            work.wait()
            # (B, H_LOCAL, S, D) -> of each rank (S_LOCAL, B, its heads, D)
            out = part.attend(kernel, received.view(q.dtype), mask, scale)
            out_exchanges.append(self._start(part.words(pack_tokens(out)), part.tokens))
        result = q.new_empty(parts[0].result)  # (B, S_LOCAL, H, D)
        for part, (received, work) in zip(parts, out_exchanges, strict=True):
            work.wait()
            place_heads(received.view(q.dtype), part.chunk.queries, result)
        return result.transpose(1, 2)  # (B, H, S_LOCAL, D)

    def _at_once(
        self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, part: Part, mask: Tensor | None, scale: float | None
    ) -> Tensor:
        """As `__call__`, with all heads in one exchange: nothing runs beside it."""
        # q (B, H, S_LOCAL, D), k, v (B, HKV, S_LOCAL, D) -> (S, B, (H_LOCAL + 2 * HKV_LOCAL) * D)
        received = self._exchange(part.pack(q, k, v), part.heads)
        out = part.attend(kernel, received.view(q.dtype), mask, scale)  # (B, H_LOCAL, S, D)
        # -> of each rank (S_LOCAL, B, its heads, D)
        received = self._exchange(part.words(pack_tokens(out)), part.tokens)
        return place_all_heads(received, q.dtype, part.chunk.queries, part.result).transpose(1, 2)

    def _exchange(self, sent: Tensor, splits: Splits) -> Tensor:
        return exchange(sent, splits, self._group)

    def _start(self, sent: Tensor, splits: Splits) -> tuple[Tensor, dist.Work]:
        return start_exchange(sent, splits, self._group)
