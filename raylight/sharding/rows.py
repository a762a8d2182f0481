"""Rows of weights: which of them a rank holds, and gathering them as bytes, whatever their dtype."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from raylight.parallel.collectives import all_gather_single


def rows_of(count: int, world_size: int, rank: int) -> slice:
    """Return the rows of `count` that `rank` holds, as `torch.chunk` cuts them.

    All ranks have ceil(count / world_size) rows, but the last ones may have fewer, or none.
    """
    most = -(-count // world_size)
    return slice(min(count, rank * most), min(count, (rank + 1) * most))


def gather_rows(local: Tensor, count: int, mesh: DeviceMesh) -> Tensor:
    """Return the full tensor (count, ...) of which `local` has the rows of `rows_of`, on its device. Collective.

    Any dtype: bytes are sent. Shards are padded to one size, which moves no row, as only the last ones are short.
    """
    most = -(-count // mesh.size())
    padded = torch.zeros(most, *local.shape[1:], dtype=local.dtype, device=local.device)  # (most, ...)
    padded[: local.shape[0]] = local
    full = torch.empty(most * mesh.size(), *local.shape[1:], dtype=local.dtype, device=local.device)
    all_gather_single(full.view(-1).view(torch.uint8), padded.view(-1).view(torch.uint8), group=mesh.get_group())
    return full[:count]
