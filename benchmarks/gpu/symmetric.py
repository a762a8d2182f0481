"""Ulysses over PyTorch's symmetric memory instead of NCCL, as a prototype: each rank writes into the others' memory.

Needs GPUs that can address each other's memory. NVLink multicast is not used. For one batch row, even shards of tokens
and heads, and no grouped queries.

A call has two barriers. No rank writes heads before the second barrier of the last call, by which all have attended to
those before, and none writes tokens before the first barrier of this one, by which all have used the last result: it is
returned in place, and the next call overwrites it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric

from raylight.parallel.exchange_layout import head_chunks, pack_heads, pack_tokens, place_all_heads, unpack_heads

TIMEOUT_MS = 20_000


@triton.jit
def _send_heads(
    q, k, v, inboxes, first, ranks, of_head, of_token, heads: tl.constexpr, width: tl.constexpr, padded: tl.constexpr
):
    """Copy one token's heads of one rank from q, k or v (H, S_LOCAL, D) into its inbox (S, 3, heads, D)."""
    token, which, rank = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head, element = tl.arange(0, padded)[:, None], tl.arange(0, width)[None, :]
    source = q
    if which == 1:
        source = k
    if which == 2:
        source = v
    given = source + (rank * heads + head).to(tl.int64) * of_head + token.to(tl.int64) * of_token + element
    inbox = tl.load(inboxes + rank).to(tl.pointer_type(q.dtype.element_ty))
    row = (first + token).to(tl.int64) * (3 * heads * width) + which * heads * width
    mask = head < heads
    tl.store(inbox + row + head * width + element, tl.load(given, mask=mask), mask=mask)


@triton.jit
def _send_tokens(
    out, inboxes, local, me, ranks, of_head, of_token, heads: tl.constexpr, width: tl.constexpr, padded: tl.constexpr
):
    """Copy one token's heads of this rank from (heads, S, D) into the inbox (S_LOCAL, ranks, heads, D) of its rank."""
    token = tl.program_id(0)
    head, element = tl.arange(0, padded)[:, None], tl.arange(0, width)[None, :]
    given = out + head.to(tl.int64) * of_head + token.to(tl.int64) * of_token + element
    inbox = tl.load(inboxes + token // local).to(tl.pointer_type(out.dtype.element_ty))
    row = ((token % local).to(tl.int64) * ranks + me) * (heads * width)
    mask = head < heads
    tl.store(inbox + row + head * width + element, tl.load(given, mask=mask), mask=mask)


class SymmetricUlysses:
    """The strategy. `how`: "kernel" writes by one kernel, "copies" packs as Raylight does and copies to each rank."""

    def __init__(self, group: dist.ProcessGroup, how: str, largest_bytes: int) -> None:
        """Allocate inboxes for `largest_bytes` of q, k and v on a rank. Collective."""
        self._rank, self._ranks, self._how = dist.get_rank(group), dist.get_world_size(group), how
        device = torch.device("cuda", torch.cuda.current_device())
        self._inboxes: list[tuple[Any, Tensor, list[Tensor]]] = []
        for nbytes in (largest_bytes, largest_bytes // 3):
            own = symmetric.empty(nbytes, dtype=torch.uint8, device=device)
            handle = symmetric.rendezvous(own, group)
            addresses = torch.tensor(list(handle.buffer_ptrs), dtype=torch.int64, device=device)
            views = [handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in range(self._ranks)]
            self._inboxes.append((handle, addresses, views))

    def __call__(
        self, kernel: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], mask: Any, scale: float | None
    ) -> Tensor:
        _, heads, local, width = q.shape
        own, total = heads // self._ranks, local * self._ranks
        handle, addresses, views = self._inboxes[0]
        padded = triton.next_power_of_2(own)
        if self._how == "kernel" and q.stride() == k.stride() == v.stride():
            _send_heads[(local, 3, self._ranks)](
                q, k, v, addresses, self._rank * local, self._ranks, q.stride(1), q.stride(2), own, width, padded
            )
        else:
            ranges = head_chunks(heads, 1, self._ranks, 1)[0].queries
            self._copy(pack_heads((q, k, v), (ranges, ranges, ranges)), views)
        handle.barrier(0, TIMEOUT_MS)
        received = views[self._rank][: total * 3 * own * width * q.element_size()].view(q.dtype)
        out = kernel(*unpack_heads(received, total, 1, [(own, width)] * 3), mask, scale)
        handle, addresses, views = self._inboxes[1]
        if self._how == "kernel":
            _send_tokens[(total,)](
                out, addresses, local, self._rank, self._ranks, out.stride(1), out.stride(2), own, width, padded
            )
        else:
            self._copy(pack_tokens(out), views)
        handle.barrier(0, TIMEOUT_MS)
        result = views[self._rank][: local * heads * width * q.element_size()].view(q.dtype)
        if self._how == "kernel":
            return result.view(1, local, heads, width).transpose(1, 2)
        ranges = head_chunks(heads, 1, self._ranks, 1)[0].queries
        return place_all_heads(result, q.dtype, ranges, (1, local, heads, width)).transpose(1, 2)

    def _copy(self, sent: Tensor, views: list[Tensor]) -> None:
        """Copy each rank's part of a contiguous buffer to its inbox, behind those of the ranks before this one."""
        parts = sent.view(-1).view(torch.uint8).chunk(self._ranks)
        for step in range(self._ranks):  # each rank begins with another, so that no link has two at once
            rank = (self._rank + step) % self._ranks
            size = parts[rank].numel()
            views[rank][self._rank * size : (self._rank + 1) * size].copy_(parts[rank])
