from __future__ import annotations

import pytest
import torch

from raylight.parallel.partition import offsets, partition


@pytest.mark.parametrize(("total", "parts"), [(7, 3), (6, 3), (2, 4), (0, 2), (75600, 8)])
def test_is_torchs_split(total: int, parts: int) -> None:
    expected = [t.numel() for t in torch.arange(total).tensor_split(parts)]
    assert list(partition(total, parts)) == expected
    assert offsets(partition(total, parts)) == tuple(sum(expected[:i]) for i in range(parts))


def test_rejects_no_parts() -> None:
    with pytest.raises(ValueError, match="at least one part, got 0"):
        partition(5, 0)
