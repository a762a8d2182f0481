"""Which rows of a matrix a rank holds, and how they come together again."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .byte_gather import all_gather


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
