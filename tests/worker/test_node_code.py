"""What counts as state that code of nodes keeps on a model between forwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from raylight.worker.node_code import ModelSnapshot


def found(*values: Any) -> str:
    """What is found when a forward sets these values, one after the other."""
    model = nn.Module()
    model.diffusion_model = nn.Linear(2, 2)
    snapshot = ModelSnapshot(ModelPatcher(model, torch.device("cpu"), torch.device("cpu")))
    for value in values:
        model.diffusion_model.theirs = value
        path = snapshot.find_state()
    snapshot.restore()
    return path


@pytest.mark.parametrize("value", [1.5, "mode", torch.float64, torch.device("cpu"), (1, 2)])
def test_a_constant_is_no_state(value: Any) -> None:
    assert found(value, value) == ""


@pytest.mark.parametrize("values", [(1, 2), (torch.float64, torch.float32), ([],), ({},)])
def test_finds_state(values: tuple[Any, ...]) -> None:
    assert found(*values) == "theirs"
