"""Ring attention, and its hybrid with Ulysses (USP).

Ring: each rank passes the keys and values of its tokens around, and merges attention over those it receives (Liu et
al. 2023, arXiv 2310.01889). Hybrid: Ulysses within a Ulysses group, the ring between these groups (Fang and Zhao 2024,
arXiv 2405.07719). Shards are uneven, some may be empty; masks, scale and grouped queries are as in one process.

Shapes: B batch rows, H heads, HKV key heads, D head size, S tokens on all ranks, S_LOCAL on this one, S_SOURCE on the
rank whose keys and values are being attended to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from raylight.attention.torch_kernels import LseFunction, Partial, merge

from .eight_bit_ulysses import EightBitUlysses
from .eight_bits import decode, encode
from .heartbeat import beat
from .partition import offsets
from .sequence_attention import Kernel
from .ulysses import UlyssesAttention


class RingAttention:
    """The ring of one group. `in_8_bits`, keys and values are encoded once, by the rank that has them, and passed on as
    they are; a rank attends to its own as the model made them.
    """

    def __init__(self, group: dist.ProcessGroup, in_8_bits: bool = False) -> None:
        self._group, self._in_8_bits = group, in_8_bits
        self._rank = dist.get_rank(group)
        self._degree = dist.get_world_size(group)

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

        The kernel is not called without queries or without keys.

        Raises ValueError: when the kernel has no log-sum-exp, without which a merge would be wrong.
        """
        if self._degree == 1:
            return kernel(q, k, v, mask, scale)
        with_lse: LseFunction | None = getattr(kernel, "with_lse", None)
        if with_lse is None:
            raise ValueError(
                "this attention backend does not return a log-sum-exp, so it cannot be used with ring_degree > 1: "
                "choose one of the TORCH backends, or a ring_degree of 1"
            )
        starts = offsets(tuple(lengths))
        if mask is not None and mask.shape[-2] > 1:
            mask = mask.narrow(-2, starts[self._rank], lengths[self._rank])  # (.., S, S) -> (.., S_LOCAL, S)
        # two (B, HKV, S_LOCAL, D) -> (2, B, HKV, S_LOCAL, D), or W bytes for D
        block = torch.stack([encode(k), encode(v)] if self._in_8_bits else [k, v])
        merged: Partial | None = None
        for step in range(self._degree):
            source = (self._rank - step) % self._degree  # the rank that block comes from
            next_block, requests = self._pass_on(block, lengths, source) if step < self._degree - 1 else (block, [])
            if lengths[self._rank] and lengths[source]:
                # (.., S_LOCAL|1, S) -> (.., S_LOCAL|1, S_SOURCE)
                block_mask = None if mask is None else mask.narrow(-1, starts[source], lengths[source])
                keys, values = (k, v) if step == 0 else self._decoded(block, k)
                # q (B, H, S_LOCAL, D), keys, values (B, HKV, S_SOURCE, D) -> (B, H, S_LOCAL, D), (B, H, S_LOCAL)
                block_out, block_lse = with_lse(q, keys, values, block_mask, scale)
                block_lse = block_lse.float()
                merged = merge(*merged, block_out, block_lse) if merged else (block_out.float(), block_lse)
            for request in requests:
                request.wait()
            block = next_block
        return torch.empty_like(q) if merged is None else merged[0].to(q.dtype)

    def _decoded(self, block: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a block that was received, of the width and dtype of `like`."""
        if not self._in_8_bits:
            return block[0], block[1]
        return decode(block[0], like.shape[3], like.dtype), decode(block[1], like.shape[3], like.dtype)

    def _pass_on(self, block: Tensor, lengths: Sequence[int], source: int) -> tuple[Tensor, list[dist.Work]]:
        """Start sending `block` (2, B, HKV, S_SOURCE, D) to the next rank, and receiving one from the previous rank.

        Return the block being received, and the requests to wait for.
        """
        beat()
        shape = list(block.shape)
        if not shape[3]:  # send one token that nobody reads: not every backend has empty messages
            block = block.new_zeros(*shape[:3], 1, shape[4])
        shape[3] = max(lengths[(source - 1) % self._degree], 1)
        next_block = block.new_empty(shape)
        to, origin = (dist.get_global_rank(self._group, (self._rank + step) % self._degree) for step in (1, -1))
        requests = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, block.contiguous(), to, self._group),
                dist.P2POp(dist.irecv, next_block, origin, self._group),
            ]
        )
        return next_block, requests


class HybridAttention:
    """Ulysses within each Ulysses group, and the ring between ranks of the same place in these groups. Both exchange
    tensors `in_8_bits` if that is true.
    """

    def __init__(self, ulysses: dist.ProcessGroup, ring: dist.ProcessGroup, in_8_bits: bool = False) -> None:
        self._ulysses_degree, self._ring_rank = dist.get_world_size(ulysses), dist.get_rank(ring)
        of_ulysses = EightBitUlysses if in_8_bits else UlyssesAttention
        # The ring overlaps its own exchange with attention: chunks would gain nothing.
        self._ulysses = of_ulysses(ulysses, chunks=1 if dist.get_world_size(ring) > 1 else None, ring=ring)
        self._ring = RingAttention(ring, in_8_bits)
        self.degrees = self._ulysses_degree, dist.get_world_size(ring)

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
        """As `Strategy`. `lengths` has the ranks of each Ulysses group next to each other.

        Ulysses: (B, H, S_LOCAL, D) -> (B, H_LOCAL, tokens of the Ulysses group, D); the ring attends over all S.
        """
        if len(lengths) == self._ulysses_degree:
            return self._ulysses(kernel, q, k, v, lengths, mask, scale)
        starts = range(0, len(lengths), self._ulysses_degree)
        groups = [lengths[start : start + self._ulysses_degree] for start in starts]
        group_lengths = [sum(group) for group in groups]

        def ring_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
            return self._ring(kernel, q, k, v, group_lengths, mask, scale)

        return self._ulysses(ring_kernel, q, k, v, groups[self._ring_rank], mask, scale)
