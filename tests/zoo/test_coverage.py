"""Every model that ComfyUI knows is in the matrix, or on the list of exceptions."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.supported_models
import pytest
import torch
from newest import of_the_newest
from torch import nn

from raylight.dev.check.seam import exists
from raylight.dev.zoo import all_families, families
from raylight.driver.preflight import is_older, running
from raylight.plans import all_plans, has_known_rows, needs_whole_batch, plan_for
from raylight.plans.exceptions import EXCEPTIONS, WHOLE_BATCH
from raylight.worker import parallel_model

pytestmark = pytest.mark.smoke
KNOWN = [model.__name__ for model in comfy.supported_models.models]
TESTED = {family.config for family in all_families().values()}
LACKING = {"0.24": {"StableAudio3"}, "0.27": {"Krea2"}}
"""Models that a release knows and cannot run, or has in a form that the plan is not for and that is refused."""
LATER = {"Trellis2": "0.33.0", "WAN_Animate2": "0.33.0"}
"""Exceptions that the newest release that is set up here does not have yet, and the first that has them."""


@pytest.mark.parametrize("config", KNOWN)
def test_tested_or_excepted(config: str) -> None:
    assert (config in TESTED) != (config in EXCEPTIONS), (
        f"{config} is new in ComfyUI: give it a plan (raylight/plans) and a family (raylight/dev/zoo), or list it in "
        f"raylight/plans/exceptions.py with the reason"
    )


@of_the_newest
def test_no_exception_is_unknown_to_comfyui() -> None:
    later = {name for name, release in LATER.items() if is_older(running(), release)}
    assert set(EXCEPTIONS) - set(KNOWN) == later


def test_what_is_left_out_is_newer_than_this_comfyui() -> None:
    left_out = {family.config for name, family in all_families().items() if name not in families()}
    assert left_out & set(KNOWN) == LACKING.get(running().rpartition(".")[0], set())


@of_the_newest
def test_every_plan_is_tested() -> None:
    used = {type(family.outline().diffusion_model) for family in families().values()}
    names = {f"{model.__module__}.{model.__qualname__}" for model in used}
    assert names <= set(all_plans())
    untested = set(all_plans()) - names
    assert [plan for plan in untested if exists(plan) is None] == [], "this ComfyUI has them"
    assert len(untested) <= len(all_families()) - len(families())


def test_says_why_a_model_has_no_plan() -> None:
    with pytest.raises(ValueError, match=r"no sequence plan for torch.*Linear \(a U-Net: .*\)\. What has one"):
        plan_for(nn.Linear(1, 1), "SDXL")


def test_says_which_models_compute_rows_by_the_whole_batch() -> None:
    assert set(EXCEPTIONS) >= WHOLE_BATCH
    for config in WHOLE_BATCH:
        assert needs_whole_batch(config) and not has_known_rows(config)
        assert "dp_degree still" in EXCEPTIONS[config]


@pytest.mark.parametrize(("config", "rows"), [("Unknown", True), ("Trellis2", False), ("WAN_Animate2", False)])
def test_batch_of_a_model_without_a_plan(config: str, rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of the batch axis divide its rows only if they are not known to depend on the whole batch."""
    monkeypatch.setattr(parallel_model, "sequence_axis", lambda _: SimpleNamespace(size=lambda: 1))
    base = SimpleNamespace(diffusion_model=nn.Linear(1, 1), model_config=type(config, (), {})())
    monkeypatch.setattr(parallel_model, "DraftedPlans", lambda _: SimpleNamespace(name=config, reason="", refused=""))
    monkeypatch.setattr(parallel_model, "given", lambda mesh, independent_rows: independent_rows)
    monkeypatch.setattr(parallel_model, "BatchParallel", lambda model, layouts, split: layouts)
    mesh = SimpleNamespace(size=lambda: 2)
    found = parallel_model.ParallelModel(base, mesh, torch.device("cpu"))
    assert found._layouts is rows
