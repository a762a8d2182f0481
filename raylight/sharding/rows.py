"""Gathering weights of dtypes that a backend does not know, as bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

# PyTorch 2.14 gave it another name and warns at the old one.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class ByteAllGather:
    """FSDP2's all-gather (`FSDPModule.set_custom_all_gather`) for 8-bit floats, which gloo and older NCCL refuse."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """`output_tensor` is (world size x n,), `input_tensor` (n,), both of one 8-bit dtype."""
        return all_gather(
            output_tensor.view(torch.uint8), input_tensor.view(torch.uint8), group=group, async_op=async_op
        )


def rows_of(count: int, world_size: int, rank: int) -> slice:
    """The rows of `count` that are rank `rank`'s: `torch.chunk`'s parts, as FSDP2 cuts them.

    All but the last have ceil(count / world_size) rows; the last ones may have fewer, or none.
    """
    part = -(-count // world_size)
    return slice(min(count, rank * part), min(count, (rank + 1) * part))


def gather_rows(local: Tensor, count: int, mesh: DeviceMesh) -> Tensor:
    """The matrix of `count` rows of which `local` is this rank's part, on the device of `local`. Collective.

    Any dtype: bytes travel. Parts are padded to one size, which moves no row, as only the last ones are short.
    """
    part = -(-count // mesh.size())
    padded = torch.zeros(part, *local.shape[1:], dtype=local.dtype, device=local.device)
    padded[: local.shape[0]] = local
    whole = torch.empty(part * mesh.size(), *local.shape[1:], dtype=local.dtype, device=local.device)
    # whole: (world size x part, ...), padded: (part, ...)
    all_gather(whole.view(-1).view(torch.uint8), padded.view(-1).view(torch.uint8), group=mesh.get_group())
    return whole[:count]
