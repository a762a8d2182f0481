from __future__ import annotations

import pytest
import torch

from raylight.parallel.rows.strips import Strips, as_strips, packed, strips_of

ORDERS = [torch.contiguous_format, torch.channels_last_3d]


def test_two_spans_of_as_many_rows_are_copied_at_once() -> None:
    assert as_strips([(4, 6), (8, 10)], 3) == (Strips((1, 5), 2),)
    assert as_strips([(4, 6), (8, 9)], 3) == (Strips((1,), 2), Strips((5,), 1))
    assert as_strips([], 3) == ()


@pytest.mark.parametrize("order", ORDERS)
def test_strips_are_rows_of_the_tensor(order: torch.memory_format) -> None:
    tensor = torch.randn(2, 3, 4, 9, 5).contiguous(memory_format=order)[..., 1:, :]
    strips = strips_of(tensor, 3, Strips((1, 5), 2))
    assert torch.equal(strips, torch.stack([tensor[..., 1:3, :], tensor[..., 5:7, :]]))
    assert torch.equal(strips_of(tensor, 3, Strips((6,), 2)), tensor[None, ..., 6:8, :])


@pytest.mark.parametrize("order", ORDERS)
def test_each_strip_may_be_of_a_batch_of_its_own(order: torch.memory_format) -> None:
    tensor = torch.randn(4, 3, 4, 9, 5).contiguous(memory_format=order)
    strips = strips_of(tensor, 3, Strips((6, 1), 2), 2)
    assert torch.equal(strips, torch.stack([tensor[:2, ..., 6:8, :], tensor[2:, ..., 1:3, :]]))


@pytest.mark.parametrize("order", ORDERS)
def test_packed_tensors_fill_memory_in_their_order(order: torch.memory_format) -> None:
    memory = torch.arange(5.0 + 2 * 24)
    tensors = packed(memory, 5, (2, 1, 3, 1, 2, 4), order)
    assert all(one.is_contiguous(memory_format=order) for one in tensors)
    assert tensors[0].storage_offset() == 5
    assert tensors[1].flatten().sort().values.equal(memory[29:])
