"""Ulysses attention: trade tokens for heads, attend over the whole sequence, trade back.

DeepSpeed Ulysses (Jacobs et al. 2023, arXiv 2309.14509), for any token count and any head count of
at least one per rank: pieces are uneven instead of padded. A large exchange goes in two parts, some heads each, so
that one travels while attention of the other is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import start_exchange
from .exchange_layout import Chunk, chunks_of, packed_heads, packed_tokens, place_heads, unpacked_heads
from .sequence_attention import Kernel

PARTS = 2
LARGE = 32 * 2**20  # bytes that come to each rank: below it, a second launch of everything costs more than it hides


class UlyssesAttention:
    """The exchange of one Ulysses group. Exchanges of at least `large` bytes go in `parts`."""

    def __init__(self, group: dist.ProcessGroup, large: int = LARGE, parts: int = PARTS) -> None:
        self._group = group
        self._rank = dist.get_rank(group)
        self._degree = dist.get_world_size(group)
        self._large, self._parts = large, parts

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
        """q (B, H, S_r, D), k and v (B, Hkv, S_r, D) of this rank's tokens; returns (B, H, S_r, D)."""
        if self._degree == 1:
            return kernel(q, k, v, mask, scale)
        batch, heads, length, _ = q.shape
        if heads < self._degree:
            raise ValueError(
                f"{heads} attention heads cannot be split over a Ulysses degree of {self._degree}: "
                f"choose a degree of at most {heads}"
            )
        group = heads // k.shape[1]
        parts = chunks_of(heads, group, self._degree, self._parts if self._is_large(q, k, v, lengths) else 1)
        # Before: all heads of S_r tokens. After: this rank's heads of all S tokens.
        arriving = [self._send_heads(q, k, v, part, lengths) for part in parts]
        returning = []
        for part, (received, work) in zip(parts, arriving, strict=True):
            work.wait()
            (start, stop), (first, last) = part.queries[self._rank], part.keys[self._rank]
            sizes = [(stop - start, q.shape[3]), (last - first, k.shape[3]), (last - first, v.shape[3])]
            own_q, own_k, own_v = unpacked_heads(received, sum(lengths), batch, sizes)  # (B, H_r, S, D)
            if start % group or stop % group:
                index = torch.arange(start, stop, device=k.device) // group - first
                own_k, own_v = own_k.index_select(1, index), own_v.index_select(1, index)
            own_mask = mask if mask is None or mask.shape[1] == 1 else mask[:, start:stop]
            out = kernel(own_q, own_k, own_v, own_mask, scale)  # (B, H_r, S, D)
            returning.append(self._send_tokens(out, part, lengths))
        result = q.new_empty(batch, length, heads, v.shape[3])
        for part, (received, work) in zip(parts, returning, strict=True):
            work.wait()
            place_heads(received, part.queries, result)
        return result.transpose(1, 2)

    def _is_large(self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> bool:
        """The same on every rank: by the tokens of all, not by one's own."""
        width = q.shape[1] * q.shape[3] + k.shape[1] * (k.shape[3] + v.shape[3])
        return q.shape[0] * sum(lengths) * width * q.element_size() // self._degree >= self._large

    def _send_heads(
        self, q: Tensor, k: Tensor, v: Tensor, part: Chunk, lengths: Sequence[int]
    ) -> tuple[Tensor, dist.Work]:
        """To each rank its heads of these tokens; what comes is (S, B, H_r x D of q, k and v)."""
        buffer, counts = packed_heads((q, k, v), (part.queries, part.keys, part.keys))
        (start, stop), (first, last) = part.queries[self._rank], part.keys[self._rank]
        per_token = q.shape[0] * ((stop - start) * q.shape[3] + (last - first) * (k.shape[3] + v.shape[3]))
        return self._exchange(buffer, counts, [per_token * tokens for tokens in lengths])

    def _send_tokens(self, out: Tensor, part: Chunk, lengths: Sequence[int]) -> tuple[Tensor, dist.Work]:
        """To each rank its tokens of these heads; what comes from rank d is (S_r, B, H_d, D)."""
        batch, heads, _, width = out.shape
        receives = [batch * lengths[self._rank] * (stop - start) * width for start, stop in part.queries]
        return self._exchange(packed_tokens(out), [batch * heads * tokens * width for tokens in lengths], receives)

    def _exchange(self, sent: Tensor, send_counts: list[int], receive_counts: list[int]) -> tuple[Tensor, dist.Work]:
        return start_exchange(sent, send_counts, receive_counts, self._group)
