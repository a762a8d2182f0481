from __future__ import annotations

import pytest
import torch
from fake_graphs import cpu_as_device

from raylight.parallel import graph_inputs
from raylight.parallel.graph_inputs import NotStaticError, copies_of, fill_static, outline, rebuilt, static_copy


@pytest.mark.parametrize(
    "tensor",
    [
        torch.rand(2, 3),
        torch.rand(3, 2).T,
        torch.rand(4, 6)[:, 1:3],
        torch.rand(1, 3).expand(4, 3),
        torch.rand(()),
        torch.rand(0, 3),
        torch.rand(2, 1, 3).expand(2, 5, 3)[:, :, ::2],
    ],
)
def test_static_copies_keep_the_layout(tensor: torch.Tensor) -> None:
    copy = static_copy(tensor)
    assert copy.shape == tensor.shape
    assert all(a == b for a, b, size in zip(copy.stride(), tensor.stride(), tensor.shape, strict=True) if size > 1)
    assert torch.equal(copy, tensor)
    other = static_copy(tensor)
    graph_inputs._without_expanded(other).add_(1)
    fill_static(copy, other)
    assert torch.equal(copy, tensor + 1)


def test_values_in_system_memory_are_compared() -> None:
    one, found = outline({"t": torch.tensor([1.0, 2.0])})
    assert found == []
    assert one == outline({"t": torch.tensor([1.0, 2.0])})[0]
    assert one != outline({"t": torch.tensor([1.0, 3.0])})[0]
    with pytest.raises(NotStaticError, match="5000 elements is in system memory"):
        outline(torch.zeros(5000))


def test_types_of_numbers_are_told_apart() -> None:
    assert outline(1)[0] != outline(True)[0]
    assert outline([1])[0] != outline((1,))[0]
    assert outline({"a": None})[0] != outline({})[0]


def test_rebuilt_values_have_containers_of_their_own() -> None:
    with cpu_as_device():
        value = {"a": [torch.ones(2), None], "b": (torch.zeros(3), {"c": 1})}
        _, tensors = outline(value)
        copies = [tensor + 5 for tensor in tensors]
        found = rebuilt(value, iter(copies))
    assert found["a"][0] is copies[0]
    assert found["b"][0] is copies[1]
    found["a"].pop()
    assert len(value["a"]) == 2


def test_outputs_of_other_kinds() -> None:
    assert copies_of([torch.ones(1), None])[1] is None
    with pytest.raises(NotStaticError, match="returns a dict"):
        copies_of({})
