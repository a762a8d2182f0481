"""Rows that come together when they are read."""

from __future__ import annotations

import pytest
import torch

from raylight.sharding.lazy_concat import LazyConcat, LazyConcatMode

Q, K, V = (torch.arange(12.0).view(4, 3) + 100 * index for index in range(3))


def joined() -> LazyConcat:
    """As ComfyUI's conversion makes it: room for the first, then twice a larger one that the former goes into."""
    with LazyConcatMode():
        matrix = torch.empty_like(Q)
        matrix.narrow(0, 0, 4)[:] = Q
        for index, piece in enumerate((K, V), start=1):
            larger = torch.empty([4 * (index + 1), 3], device=Q.device, dtype=Q.dtype)
            larger[: matrix.shape[0]] = matrix
            larger.narrow(0, 4 * index, 4)[:] = piece
            matrix = larger
    return matrix


@pytest.mark.parametrize("rows", [slice(None), slice(0, 5), slice(3, 9), slice(5, 7), slice(9, 12), slice(12, 12)])
def test_any_rows_are_those_of_the_concatenation(rows: slice) -> None:
    assert torch.equal(joined()[rows], torch.cat([Q, K, V])[rows])


def test_it_can_be_a_parameter() -> None:
    parameter = torch.nn.Parameter(joined(), requires_grad=False)
    assert parameter.shape == (12, 3)
    assert torch.equal(parameter.detach()[...], torch.cat([Q, K, V]))


def test_what_is_assigned_last_counts() -> None:
    matrix = joined()
    matrix.narrow(0, 4, 4)[:] = V
    assert torch.equal(matrix[:], torch.cat([Q, V, V]))


def test_it_knows_what_is_missing() -> None:
    with LazyConcatMode():
        matrix = torch.empty([8, 3], device=Q.device, dtype=Q.dtype)
    matrix.narrow(0, 4, 4)[:] = K
    assert not matrix.is_complete
    matrix[:4] = Q
    assert matrix.is_complete


def test_rejects_what_it_cannot_do() -> None:
    with pytest.raises(NotImplementedError, match="dim 0, not 1"):
        joined().narrow(1, 0, 2)
    with pytest.raises(NotImplementedError, match="still in their file"):
        joined() + 1
    with pytest.raises(ValueError, match=r"\(4, 3\) do not fit into 2 of \(12, 3\)"):
        joined()[:2] = Q
