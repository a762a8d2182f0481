"""Gathering weights of dtypes that a backend does not know, as bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# PyTorch 2.14 gave it another name and warns at the old one.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class ByteAllGather:
    """FSDP2's all-gather (`FSDPModule.set_custom_all_gather`) for 8-bit floats, which gloo and older NCCL refuse."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup,
                 async_op: bool = False) -> dist.Work | None:
        """`output_tensor` is (world size x n,), `input_tensor` (n,), both of one 8-bit dtype."""
        return all_gather(output_tensor.view(torch.uint8), input_tensor.view(torch.uint8), group=group,
                           async_op=async_op)
