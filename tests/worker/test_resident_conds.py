"""Conditioning that stays on the device of a run: copies, and what is copied anew or left."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from comfy.conds import CONDConstant, CONDCrossAttn, CONDList, CONDRegular
from comfy.patcher_extension import WrappersMP

from raylight.worker import resident_conds
from raylight.worker.resident_conds import ResidentConds

X, TIME = torch.zeros(1), torch.ones(1)
ELSEWHERE = torch.device("meta")  # takes copies as a GPU does


class OfANode(CONDRegular):
    """A kind of conditioning that ComfyUI does not have."""


def seen(wrapper: ResidentConds, *conds: Any, options: dict[str, Any] | None = None, **more: Any) -> list[Any]:
    """Return what ComfyUI gets of conditioning that a step has."""
    given = [{"model_conds": {str(at): cond for at, cond in enumerate(conds)}, **more}]

    def calculate(model: Any, conds: list[Any], x: Any, timestep: Any, given_options: Any) -> list[Any]:
        assert (model, conds[1], x, timestep, given_options) == ("model", None, X, TIME, options or {})
        assert {name: conds[0][0][name] for name in more} == more
        return list(conds[0][0]["model_conds"].values())

    return wrapper(calculate, "model", [given, None], X, TIME, options or {})


def test_is_copied_once_and_the_original_stays() -> None:
    wrapper = ResidentConds(ELSEWHERE)
    text, images = CONDCrossAttn(torch.ones(1, 4, 8)), CONDList([torch.ones(2), torch.ones(3)])
    first, second = seen(wrapper, text, images, strength=0.5), seen(wrapper, text, images, strength=0.5)
    assert [type(cond) for cond in first] == [CONDCrossAttn, CONDList]
    assert first[0].cond.device == ELSEWHERE and first[0].cond.shape == text.cond.shape
    assert [part.device for part in first[1].cond] == [ELSEWHERE] * 2
    assert all(one is two for one, two in zip(first, second, strict=True))
    assert text.cond.device.type == "cpu"


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("used", [False, True])
def test_what_changes_is_copied_anew(made: bool, used: bool) -> None:
    """In and out of inference mode."""
    wrapper = ResidentConds(ELSEWHERE)
    with torch.inference_mode(made):
        content = torch.ones(1, 4)
    with torch.inference_mode(used or made):  # what is made in that mode cannot be written to outside of it
        cond = CONDRegular(content)
        before = seen(wrapper, cond)[0]
        cond.cond[0, 1] = 2.0
        written = seen(wrapper, cond)[0]
        assert written is not before
        assert seen(wrapper, cond)[0] is written
        cond.cond = torch.zeros(1, 5)
        assert seen(wrapper, cond)[0].cond.shape == (1, 5)


def test_other_kinds_are_left() -> None:
    wrapper = ResidentConds(ELSEWHERE)
    kinds = OfANode(torch.ones(2)), CONDConstant(3), CONDRegular(torch.ones(2, device=ELSEWHERE))
    assert all(one is cond for one, cond in zip(seen(wrapper, *kinds), kinds, strict=True))
    assert wrapper(lambda _, conds, *__: conds, "model", [[{"without": 1}]], X, TIME, {}) == [[{"without": 1}]]


@pytest.mark.parametrize(
    "options",
    [
        {"model_function_wrapper": print},
        {"transformer_options": {"wrappers": {WrappersMP.APPLY_MODEL: {"of a node": [print]}}}},
    ],
)
def test_code_on_the_way_to_the_model_finds_it_where_comfyui_has_it(options: dict[str, Any]) -> None:
    cond = CONDRegular(torch.ones(2))
    assert seen(ResidentConds(ELSEWHERE), cond, options=options) == [cond]


def test_all_of_a_step_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident_conds, "_LARGEST_BYTES", 100)
    wrapper = ResidentConds(ELSEWHERE)
    one, more = CONDRegular(torch.ones(20)), CONDRegular(torch.ones(10))
    assert [cond.cond.device.type for cond in seen(wrapper, one, more)] == ["cpu", "cpu"]
    assert seen(wrapper, one)[0].cond.device == ELSEWHERE


def test_copies_go_with_what_they_are_of() -> None:
    wrapper, copies = ResidentConds(ELSEWHERE), []
    for _ in range(2):  # each of one step only
        cond = CONDRegular(torch.ones(20))
        copies.append(weakref.ref(seen(wrapper, cond)[0]))
        assert copies[-1]() is not None
        del cond
        gc.collect()
    assert [copy() for copy in copies] == [None, None]
