"""How a count of tokens or heads is dealt to ranks. No padding: the first ranks take one more."""

from __future__ import annotations


def partition(total: int, parts: int) -> tuple[int, ...]:
    """Sizes of `parts` contiguous pieces of `total`, as `torch.tensor_split` cuts them.

    >>> partition(7, 3)
    (3, 2, 2)
    """
    if parts < 1:
        raise ValueError(f"partition needs at least one part, got {parts}")
    base, extra = divmod(total, parts)
    return tuple(base + (i < extra) for i in range(parts))


def offsets(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Start of each piece, for pieces of `sizes` laid end to end."""
    starts, position = [], 0
    for size in sizes:
        starts.append(position)
        position += size
    return tuple(starts)
