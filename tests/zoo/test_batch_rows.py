"""Batch rows of every model family, computed apart: what ComfyUI makes of them together, in every situation. Where it
is something else, the plan says so.

Groups of workers do it at the same time; here one process does it row by row, through the same code.
"""

from __future__ import annotations

from typing import Any

import comfy.supported_models
import pytest
import torch
from torch import Tensor

from raylight.dev.zoo.family import Draw, randomize
from raylight.dev.zoo.table import families
from raylight.parallel.batch import Rows
from raylight.plans import has_known_rows, plan_for
from raylight.worker.batch_parallel import BatchParallel
from raylight.worker.forward_kinds import copied
from raylight.worker.layouts import Layout, Layouts, RowsAre

TOLERANCE = 1e-4
ROWS = 2


class OneByOne(Layouts):
    """Stands for a batch axis with a group for each row."""

    divided, together = 0, False

    def of(self, rows: int, rows_are: RowsAre) -> Layout:
        assert rows == ROWS
        self.together = rows_are is RowsAre.TOGETHER
        return Layout(None if self.together else self, None)  # type: ignore[arg-type]

    def of_own_run(self) -> Layout:
        raise AssertionError

    def call(self, function: Any, total: int) -> Any:
        self.divided += 1
        return _joined([function(Rows(row, row + 1, total)) for row in range(total)])


def _joined(values: list[Any]) -> Any:
    """Return tensors of one row each as one, as ComfyUI makes a batch of conditionings, and outputs are gathered."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(values) if first.ndim and first.shape[0] == 1 else first
    if isinstance(first, dict):
        return {name: _joined([value[name] for value in values]) for name in first}
    if isinstance(first, (list, tuple)):
        return type(first)(_joined(list(items)) for items in zip(*values, strict=True))
    return first


def _kinds(inputs: dict[str, Any]) -> list[str]:
    return [kind for kind in inputs.get("transformer_options", {}).get("patches", {}) if kind.startswith("attn")]


# What ComfyUI itself computes for one row only.
ONE_ROW = {("Hunyuan Video", "padded prompt"), ("MiniMax H3", "")}
CALLS = [
    (name, call)
    for name, family in families().items()
    for call in family.calls
    if not ONE_ROW & {(name, call), (name, "")}
]


@pytest.mark.parametrize(("name", "call"), CALLS)
@torch.inference_mode()
def test_rows_are_as_independent_as_the_plan_says(name: str, call: str) -> None:
    family = families()[name]
    model, make = family.build(), family.calls[call]
    each = [make(Draw(seed)) for seed in (3, 4)]
    if each[0]["x"].shape[0] != 1:
        inputs = each[0]
    else:
        options = each[0].get("transformer_options", {})  # code, which is not of a row
        inputs = _joined([{key: one[key] for key in one if key != "transformer_options"} for one in each])
        inputs |= {"transformer_options": options} if options else {}
    inputs["t"] = inputs["t"][:1].expand(ROWS)  # as every sampler calls a model
    expected = model.apply_model(**copied(inputs))
    layouts = OneByOne()
    rows = BatchParallel(model.diffusion_model, layouts, None)
    rows.finalize_hooks()
    try:
        actual = model.apply_model(**copied(inputs))
    finally:
        rows.remove()
    assert layouts.together == bool(_kinds(inputs))
    assert (layouts.divided > 0) != layouts.together and actual.shape == expected.shape
    difference = ((actual - expected).abs().max() / expected.std()).item()
    assert (difference <= TOLERANCE) == plan_for(model.diffusion_model).independent_rows, difference


@torch.inference_mode()
def test_rows_of_a_u_net_are_independent() -> None:
    config = comfy.supported_models.SD15(
        {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 32,
            "num_res_blocks": [1, 1],
            "channel_mult": [1, 2],
            "transformer_depth": [1, 1],
            "transformer_depth_output": [1, 1, 1, 1],
            "transformer_depth_middle": 1,
            "use_spatial_transformer": True,
            "use_linear_in_transformer": False,
            "context_dim": 24,
            "num_heads": 4,
            "num_head_channels": -1,
            "use_temporal_attention": False,
            "adm_in_channels": None,
        }
    )
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "").eval().requires_grad_(False)
    randomize(model.diffusion_model, 0)
    draw = Draw(3)
    inputs = {"x": draw(ROWS, 4, 12, 10), "t": torch.tensor([0.7] * ROWS), "c_crossattn": draw(ROWS, 9, 24)}
    expected = model.apply_model(**copied(inputs))
    layouts = OneByOne()
    rows = BatchParallel(model.diffusion_model, layouts, None)
    rows.finalize_hooks()
    actual = model.apply_model(**copied(inputs))
    assert layouts.divided == 1
    assert ((actual - expected).abs().max() / expected.std()).item() <= TOLERANCE
    assert has_known_rows("SD15") and not has_known_rows("WAN21_CausalAR_T2V") and not has_known_rows("WAN21_T2V")
