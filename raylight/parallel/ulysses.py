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
        batch, heads, _, width = q.shape
        if heads < self._degree:
            raise ValueError(
                f"{heads} attention heads cannot be split over a Ulysses degree of {self._degree}: "
                f"choose a degree of at most {heads}"
            )
        group = heads // k.shape[1]
        split = partition(heads, self._degree)
        # The key heads of each rank's query heads; a group of queries may end up on two ranks.
        spans = [(start // group, (start + count - 1) // group + 1)
                 for start, count in zip(offsets(split), split, strict=True)]
        mine, (first, last) = split[self._rank], spans[self._rank]

        # Before: all heads of S_r tokens. After: this rank's heads of all S tokens.
        pieces = [(part, k[:, start:stop], v[:, start:stop])
                  for part, (start, stop) in zip(q.split(split, 1), spans, strict=True)]
        shapes = [
            [(batch, mine, length, width), (batch, last - first, length, width),
             (batch, last - first, length, v.shape[3])]
            for length in lengths
        ]
        received = exchange(pieces, shapes, self._group)
        q, k, v = (torch.cat(parts, dim=2) for parts in zip(*received, strict=True))  # (B, H_r, S, D)
        start = offsets(split)[self._rank]
        if start % group or mine % group:
            index = torch.arange(start, start + mine, device=k.device) // group - first
            k, v = k.index_select(1, index), v.index_select(1, index)
        if mask is not None and mask.shape[1] > 1:
            mask = mask.narrow(1, start, mine)

        out = kernel(q, k, v, mask, scale)  # (B, H_r, S, D)

        # Back: rank d gets its S_d tokens of this rank's heads.
        pieces = [[part] for part in out.split(list(lengths), 2)]
        shapes = [[(batch, count, lengths[self._rank], out.shape[3])] for count in split]
        return torch.cat([parts[0] for parts in exchange(pieces, shapes, self._group)], dim=1)  # (B, H, S_r, D)
