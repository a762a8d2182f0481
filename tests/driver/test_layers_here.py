"""A node that calls a model's layers by itself gets what ComfyUI gives, and is told that workers take no part."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import comfy.sd
import pytest
import torch
from comfy_cases import CASES, checkpoint
from comfy_execution.utils import CurrentNodeContext
from torch import Tensor

from raylight.driver import weightless
from raylight.host.recipe import ModelRecipe


def by_its_layers(model: Any) -> Tensor:
    """Return the output of a Flux without its own forward, as samplers of some packs compute it."""
    generator = torch.Generator().manual_seed(1)
    width = model.txt_in.in_features
    img, txt = (torch.randn(1, *shape, generator=generator) for shape in ((6, model.in_channels), (4, width)))
    y = torch.randn(1, model.vector_in.in_layer.in_features, generator=generator)
    timesteps = torch.tensor([0.5])
    return type(model).forward_orig(
        model, img, torch.zeros(1, 6, 3), txt, torch.zeros(1, 4, 3), timesteps, y, timesteps
    )


def refused(*_: Any) -> None:
    raise AssertionError("workers are asked")


def test_a_node_is_told_once_that_workers_take_no_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = checkpoint(tmp_path, CASES["Flux with guidance"])
    with torch.inference_mode():
        expected = by_its_layers(comfy.sd.load_diffusion_model(str(path)).model.diffusion_model)
        assert not caplog.messages
        base = weightless.build(ModelRecipe.of(str(path), "default"), refused)
        with caplog.at_level(logging.WARNING, "raylight"):
            for node in ("7", "7", "12"):
                with CurrentNodeContext("prompt", node, 0):
                    assert torch.equal(by_its_layers(base.diffusion_model), expected)
    assert [message.partition(": ")[0] for message in caplog.messages] == ["node 7", "node 12"]
    assert "workers take no part: use a sampler of ComfyUI's" in caplog.text
    assert weightless.baseline_of(base).changes(base) == []
