"""Which rows of a matrix a rank holds."""

from __future__ import annotations


def rows_of(count: int, world_size: int, rank: int) -> slice:
    """The rows of `count` that are rank `rank`'s: `torch.chunk`'s parts, as FSDP2 cuts them.

    All but the last have ceil(count / world_size) rows; the last ones may have fewer, or none.
    """
    part = -(-count // world_size)
    return slice(min(count, rank * part), min(count, (rank + 1) * part))
