"""Every model that ComfyUI knows is in the matrix, or on the list of exceptions."""

from __future__ import annotations

import comfy.supported_models
import pytest
from newest import of_the_newest
from torch import nn

from raylight.dev.zoo import all_families, families
from raylight.driver.preflight import running
from raylight.plans import all_plans, plan_for
from raylight.plans.exceptions import EXCEPTIONS

pytestmark = pytest.mark.smoke
KNOWN = [model.__name__ for model in comfy.supported_models.models]
TESTED = {family.config for family in all_families().values()}
LACKING = {"0.24": {"StableAudio3"}, "0.27": {"Krea2"}}
"""Models that a release knows and cannot run, or has in a form that the plan is not for and that is refused."""


@pytest.mark.parametrize("config", KNOWN)
def test_tested_or_excepted(config: str) -> None:
    assert (config in TESTED) != (config in EXCEPTIONS), (
        f"{config} is new in ComfyUI: give it a plan (raylight/plans) and a family (raylight/dev/zoo), or list it in "
        f"raylight/plans/exceptions.py with the reason"
    )


@of_the_newest
def test_no_exception_is_unknown_to_comfyui() -> None:
    assert set(EXCEPTIONS) <= set(KNOWN)


def test_what_is_left_out_is_newer_than_this_comfyui() -> None:
    left_out = {family.config for name, family in all_families().items() if name not in families()}
    assert left_out & set(KNOWN) == LACKING.get(running().rpartition(".")[0], set())


@of_the_newest
def test_every_plan_is_tested() -> None:
    used = {type(family.outline().diffusion_model) for family in families().values()}
    assert {f"{model.__module__}.{model.__qualname__}" for model in used} == set(all_plans())


def test_says_why_a_model_has_no_plan() -> None:
    with pytest.raises(ValueError, match=r"no sequence plan for torch.*Linear \(a U-Net: .*\)\. What has one"):
        plan_for(nn.Linear(1, 1), "SDXL")
