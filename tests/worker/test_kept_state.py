"""What a model keeps from one forward to the next is seen, and what it only makes anew is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from raylight.worker import kept_state
from raylight.worker.kept_state import kept_by


class Cache:
    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.cache, self.position = Cache(), 0
        self.register_buffer("table", torch.arange(4.0))
        self.large = torch.zeros(8)


def _write(model: Model) -> None:
    model.large[3] = 1


def _count(model: Model) -> None:
    model.position += 1


def _append(model: Model) -> None:
    model.cache.keys.append(torch.ones(1))


def _replace(model: Model) -> None:
    model.table = torch.arange(4.0) + 1


@pytest.mark.parametrize("change", [_write, _count, _append, _replace])
@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_changes_are_seen(
    change: Callable[[Model], None], is_large: bool, inference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.inference_mode(inference):
        model = Model()
        monkeypatch.setattr(kept_state, "_LARGE", 2 if is_large else 100)
        before = kept_by(model)
        assert kept_by(model) == before
        change(model)
        assert kept_by(model) != before


def test_a_table_that_is_made_anew_is_no_change() -> None:
    model = Model()
    before = kept_by(model)
    model.table = torch.arange(4.0)
    model.linear.weight.data += 1  # as nodes do between runs
    assert kept_by(model) == before
