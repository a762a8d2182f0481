"""Ulysses attention: trade tokens for heads, attend over the whole sequence, trade back.

DeepSpeed Ulysses (Jacobs et al. 2023, arXiv 2309.14509), for any token count and any head count of
at least one per rank: pieces are uneven instead of padded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .attention import Kernel
from .collectives import exchange
from .partition import offsets, partition


class UlyssesAttention:
    """The exchange of one Ulysses group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._rank = dist.get_rank(group)
        self._degree = dist.get_world_size(group)

    def __call__(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int],
                 mask: Tensor | None, scale: float | None) -> Tensor:
        """q (B, H, S_r, D), k and v (B, Hkv, S_r, D) of this rank's tokens; returns (B, H, S_r, D)."""
        if self._degree == 1:
            return kernel(q, k, v, mask, scale)
        if k.shape[1] < self._degree:
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        batch, kv_heads, _, width = k.shape
        if kv_heads < self._degree:
            raise ValueError(
                f"{kv_heads} attention heads cannot be split over a Ulysses degree of {self._degree}: "
                f"choose a degree of at most {kv_heads}"
            )
        per_kv = q.shape[1] // kv_heads
        kv_split = partition(kv_heads, self._degree)
        q_split = tuple(heads * per_kv for heads in kv_split)
        mine = kv_split[self._rank]

        # Before: all heads of S_r tokens. After: this rank's heads of all S tokens.
        pieces = list(zip(q.split(q_split, 1), k.split(kv_split, 1), v.split(kv_split, 1), strict=True))
        shapes = [
            [(batch, mine * per_kv, length, width), (batch, mine, length, width), (batch, mine, length, v.shape[3])]
            for length in lengths
        ]
        received = exchange(pieces, shapes, self._group)
        q, k, v = (torch.cat(parts, dim=2) for parts in zip(*received, strict=True))  # (B, H_r, S, D)
        if mask is not None and mask.shape[1] > 1:
            mask = mask.narrow(1, offsets(q_split)[self._rank], q_split[self._rank])

        out = kernel(q, k, v, mask, scale)  # (B, H_r, S, D)

        # Back: rank d gets its S_d tokens of this rank's heads.
        pieces = [[part] for part in out.split(list(lengths), 2)]
        shapes = [[(batch, heads, lengths[self._rank], out.shape[3])] for heads in q_split]
        return torch.cat([parts[0] for parts in exchange(pieces, shapes, self._group)], dim=1)  # (B, H, S_r, D)
