"""Functions that are sent with their code still work together; writes to tensors that are sent can be seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from raylight.cluster import serialization


def there(value: Any) -> Any:
    return serialization.unpack(serialization.pack(value, lambda _: None), lambda one: one, torch.device("cpu"))


def counter() -> tuple[Callable[[], None], Callable[[], int]]:
    count = 0

    def step() -> None:
        nonlocal count
        count += 1

    def steps() -> int:
        return count

    return step, steps


def test_functions_still_share_their_variables() -> None:
    step, steps = counter()
    step()
    step_there, steps_there = there((step, steps))
    step_there()
    assert (steps_there(), steps()) == (2, 1)


def test_a_function_that_calls_itself() -> None:
    def fall(number: int) -> int:
        return number and fall(number - 1)

    assert there(fall)(3) == 0


def test_writes_are_counted_in_every_mode() -> None:
    with torch.inference_mode():
        received = there(torch.ones(3))
        before = received._version
        received[1] = 2.0
        assert received._version > before
        weight = there(torch.nn.Parameter(torch.ones(3), requires_grad=False))
    assert weight.is_inference(), "a weight is of the mode in which it is used"


def test_views_that_are_conjugated_or_negated() -> None:
    value = torch.randn(3, dtype=torch.complex64)
    for view in (value.conj(), value.conj().imag):
        assert torch.equal(there(view), view)
