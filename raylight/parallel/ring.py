"""Ring attention, and its hybrid with Ulysses (USP).

Ring: keys and values of each rank travel around while partial attention is merged (Liu et al. 2023, arXiv
2310.01889). Hybrid: Ulysses within a row of the mesh, the ring between rows (Fang and Zhao 2024, arXiv 2405.07719).
Pieces are uneven, some may be empty; masks, scale and grouped queries are as in one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from raylight.attention.torch_kernels import Partial, merge

from .heartbeat import beat
from .partition import offsets
from .sequence_attention import Kernel
from .ulysses import PARTS, UlyssesAttention


class LseKernel(Kernel, Protocol):
    """A kernel that can also return the true log-sum-exp (B, H, Sq) of its scores."""

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Partial: ...


class RingAttention:
    """The ring of one group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._rank = dist.get_rank(group)
        self._degree = dist.get_world_size(group)

    def __call__(
        self,
        kernel: LseKernel,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int],
        mask: Tensor | None,
        scale: float | None,
    ) -> Tensor:
        """q (B, H, S_r, D), k and v (B, Hkv, S_r, D) of this rank's tokens; returns (B, H, S_r, D).

        The kernel is not called where there are no queries or no keys.

        Raises ValueError for a kernel that has no log-sum-exp: a merge without it would be wrong.
        """
        if self._degree == 1:
            return kernel(q, k, v, mask, scale)
        if not hasattr(kernel, "with_lse"):
            raise ValueError(
                "this attention backend does not return a log-sum-exp, so it cannot be used with ring_degree > 1: "
                "choose one of the TORCH backends, or a ring_degree of 1"
            )
        starts = offsets(tuple(lengths))
        if mask is not None and mask.shape[-2] > 1:
            mask = mask.narrow(-2, starts[self._rank], lengths[self._rank])
        block = torch.stack([k, v])  # (2, B, Hkv, S_r, D)
        out = total = None
        for step in range(self._degree):
            source = (self._rank - step) % self._degree
            arriving, requests = self._pass_on(block, lengths, source) if step < self._degree - 1 else (None, [])
            if lengths[self._rank] and lengths[source]:
                columns = None if mask is None else mask.narrow(-1, starts[source], lengths[source])
                more, block_lse = kernel.with_lse(q, block[0], block[1], columns, scale)
                if out is None:
                    out, total = more.float(), block_lse.float()
                else:
                    out, total = merge(out, total, more, block_lse.float())
            for request in requests:
                request.wait()
            block = arriving
        return torch.empty_like(q) if out is None else out.to(q.dtype)

    def _pass_on(self, block: Tensor, lengths: Sequence[int], source: int) -> tuple[Tensor, list[dist.Work]]:
        """Start sending this block to the next rank and receiving the previous rank's, beside the computation."""
        beat()
        shape = list(block.shape)
        if not shape[3]:  # an empty piece travels as a row that nobody reads: not every backend has empty messages
            block = block.new_zeros(*shape[:3], 1, shape[4])
        shape[3] = max(lengths[(source - 1) % self._degree], 1)
        arriving = block.new_empty(shape)
        to, origin = (dist.get_global_rank(self._group, (self._rank + way) % self._degree) for way in (1, -1))
        requests = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, block.contiguous(), to, self._group),
                dist.P2POp(dist.irecv, arriving, origin, self._group),
            ]
        )
        return arriving, requests


class HybridAttention:
    """Ulysses within each row of a mesh of ring x Ulysses, the ring between rows."""

    def __init__(self, ulysses: dist.ProcessGroup, ring: dist.ProcessGroup) -> None:
        self._width, self._rows = dist.get_world_size(ulysses), dist.get_world_size(ring)
        # A ring already has its exchange beside its computation.
        self._ulysses = UlyssesAttention(ulysses, parts=1 if self._rows > 1 else PARTS)
        self._ring = RingAttention(ring)
        self._row = dist.get_rank(ring)

    def __call__(
        self,
        kernel: LseKernel,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int],
        mask: Tensor | None,
        scale: float | None,
    ) -> Tensor:
        """As `Strategy`, for the tokens of all rows and ranks, Ulysses ranks next to each other."""
        rows = [lengths[start : start + self._width] for start in range(0, len(lengths), self._width)]
        row_lengths = [sum(row) for row in rows]

        def around(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
            return self._ring(kernel, q, k, v, row_lengths, mask, scale)

        return self._ulysses(around, q, k, v, rows[self._row], mask, scale)
