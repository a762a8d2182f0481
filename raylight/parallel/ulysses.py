"""Ulysses attention: exchange tokens for heads, attend over the full sequence, and exchange back.

DeepSpeed Ulysses (Jacobs et al. 2023, arXiv 2309.14509), for any number of tokens, and of heads from one per rank:
shards are uneven instead of padded. A large exchange is made in two chunks of heads: one is sent while attention of
the other is computed.

Shapes: B batch rows, H heads, HKV key heads, D head size, S tokens on all ranks; S_LOCAL, H_LOCAL and HKV_LOCAL are
this rank's (of one chunk). Key heads are those that the rank's query heads need.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import start_exchange
from .exchange_layout import Chunk, head_chunks, pack_heads, pack_tokens, place_heads, unpack_heads
from .sequence_attention import Kernel

CHUNKS = 2
LARGE_BYTES = 32 * 2**20  # received per rank; below it, launching everything twice costs more than it hides


class UlyssesAttention:
    """The exchange of one Ulysses group. Exchanges of at least `large_bytes` are made in `chunks`."""

    def __init__(self, group: dist.ProcessGroup, large_bytes: int = LARGE_BYTES, chunks: int = CHUNKS) -> None:
        self._group = group
        self._rank = dist.get_rank(group)
        self._degree = dist.get_world_size(group)
        self._large_bytes, self._chunks = large_bytes, chunks

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
        batch, heads, length, _ = q.shape
        if heads < self._degree:
            raise ValueError(
                f"{heads} attention heads cannot be split over a Ulysses degree of {self._degree}: "
                f"choose a degree of at most {heads}"
            )
        group = heads // k.shape[1]  # query heads per key head
        count = self._chunks if self._is_large(q, k, v, lengths) else 1
        chunks = head_chunks(heads, group, self._degree, count)
        # q (B, H, S_LOCAL, D), k, v (B, HKV, S_LOCAL, D) -> (S, B, (H_LOCAL + 2 * HKV_LOCAL) * D), for each chunk
        qkv_exchanges = [self._send_heads(q, k, v, chunk, lengths) for chunk in chunks]
        out_exchanges = []
        for chunk, (received, work) in zip(chunks, qkv_exchanges, strict=True):
            work.wait()
            (start, stop), (first, last) = chunk.queries[self._rank], chunk.keys[self._rank]
            sizes = [(stop - start, q.shape[3]), (last - first, k.shape[3]), (last - first, v.shape[3])]
            # (S, B, ...) -> q (B, H_LOCAL, S, D), k, v (B, HKV_LOCAL, S, D): views
            q_heads, k_heads, v_heads = unpack_heads(received, sum(lengths), batch, sizes)
            if start % group or stop % group:  # a group of query heads is on two ranks: one key head per query head
                index = torch.arange(start, stop, device=k.device) // group - first
                k_heads, v_heads = (t.index_select(1, index) for t in (k_heads, v_heads))
            # (B, H, S|1, S) -> (B, H_LOCAL, S|1, S)
            mask_heads = mask if mask is None or mask.shape[1] == 1 else mask[:, start:stop]
            out = kernel(q_heads, k_heads, v_heads, mask_heads, scale)  # (B, H_LOCAL, S, D)
            # (B, H_LOCAL, S, D) -> of each rank (S_LOCAL, B, its heads, D)
            out_exchanges.append(self._send_tokens(out, chunk, lengths))
        result = q.new_empty(batch, length, heads, v.shape[3])  # (B, S_LOCAL, H, D)
        for chunk, (received, work) in zip(chunks, out_exchanges, strict=True):
            work.wait()
            place_heads(received, chunk.queries, result)
        return result.transpose(1, 2)  # (B, H, S_LOCAL, D)

    def _is_large(self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> bool:
        """Return the same on every rank, since it counts the tokens of all."""
        width = q.shape[1] * q.shape[3] + k.shape[1] * (k.shape[3] + v.shape[3])
        return q.shape[0] * sum(lengths) * width * q.element_size() // self._degree >= self._large_bytes

    def _send_heads(
        self, q: Tensor, k: Tensor, v: Tensor, chunk: Chunk, lengths: Sequence[int]
    ) -> tuple[Tensor, dist.Work]:
        """Send each rank its heads of these tokens; receive (S, B, (H_LOCAL + 2 * HKV_LOCAL) * D), flat."""
        buffer, counts = pack_heads((q, k, v), (chunk.queries, chunk.keys, chunk.keys))
        (start, stop), (first, last) = chunk.queries[self._rank], chunk.keys[self._rank]
        per_token = q.shape[0] * ((stop - start) * q.shape[3] + (last - first) * (k.shape[3] + v.shape[3]))
        return self._exchange(buffer, counts, [per_token * tokens for tokens in lengths])

    def _send_tokens(self, out: Tensor, chunk: Chunk, lengths: Sequence[int]) -> tuple[Tensor, dist.Work]:
        """Send each rank its tokens of these heads; receive (S_LOCAL, B, H of rank d, D) from each rank d, flat."""
        batch, heads, _, width = out.shape
        receives = [batch * lengths[self._rank] * (stop - start) * width for start, stop in chunk.queries]
        return self._exchange(pack_tokens(out), [batch * heads * tokens * width for tokens in lengths], receives)

    def _exchange(self, sent: Tensor, send_counts: list[int], receive_counts: list[int]) -> tuple[Tensor, dist.Work]:
        return start_exchange(sent, send_counts, receive_counts, self._group)
