"""yunchang and xfuser: the same result as ours for calls that they support, and clear errors for those they do not."""

from __future__ import annotations

import functools

import pytest
from external_cases import against_xfuser, against_yunchang

from raylight.dev.local_ranks import run_ranks, values
from raylight.parallel import external_strategies

WORLDS = (2, 3)


@functools.cache
def yunchang_reports(world: int) -> list[dict]:
    return values(run_ranks(world, against_yunchang))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(
    ("case", "by_yunchang"),
    [
        ("equal pieces", 1),
        ("a scale", 1),
        ("tokens that do not divide", 0),
        ("heads that do not divide", 0),
        ("grouped queries", 0),
        ("a mask", 0),
    ],
)
def test_yunchang_and_ours_agree(case: str, by_yunchang: int, world: int) -> None:
    for report in yunchang_reports(world):
        errors, calls = report[case]
        assert calls == by_yunchang
        assert max(errors.values()) <= 1e-5


@pytest.mark.slow
def test_xfuser_and_ours_agree() -> None:
    for errors in values(run_ranks(2, against_xfuser, timeout_s=120)):
        assert set(errors) == {"ours", "xfuser"}
        assert max(errors.values()) <= 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("yunchang", "SAGE_FP16", 1, True), "yunchang cannot be used with XFuser_attention = SAGE_FP16"),
        (("yunchang", "TORCH_CUDNN", 2, True), "yunchang has no true log-sum-exp with XFuser_attention = TORCH_CUDNN"),
        (("yunchang", "TORCH_FLASH", 2, False), "its ring would be wrong"),
        (("xfuser", "TORCH", 1, False), "xfuser needs a GPU: choose raylight"),
        (("other", "TORCH", 1, True), "other is not known: choose one of raylight, yunchang, xfuser"),
    ],
)
def test_refuses(arguments: tuple[str, str, int, bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        external_strategies.check_strategy(*arguments)


@pytest.mark.parametrize(
    ("name", "absent", "message"),
    [
        ("yunchang", "yunchang", "yunchang needs the Python package yunchang: run pip install --no-deps yunchang"),
        (
            "xfuser",
            "xfuser",
            "xfuser needs the Python package xfuser: install it as .* says, so that torch stays as it is",
        ),
        ("xfuser", "yunchang", "xfuser needs the Python package yunchang: run pip install --no-deps yunchang"),
    ],
)
def test_says_what_is_missing(name: str, absent: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = external_strategies.importlib.util.find_spec
    monkeypatch.setattr(external_strategies.importlib.util, "find_spec", lambda m: None if m == absent else there(m))
    with pytest.raises(ValueError, match=message):
        external_strategies.check_strategy(name, "TORCH", 1, True)


def test_accepts() -> None:
    external_strategies.check_strategy("raylight", "SAGE_FP16", 4, False)
    external_strategies.check_strategy("raylight_int8", "SAGE_FP16", 4, False)
    external_strategies.check_strategy("yunchang", "TORCH", 1, False)
    external_strategies.check_strategy("yunchang", "TORCH_FLASH", 2, True)
    external_strategies.check_strategy("xfuser", "FA", 2, True)
