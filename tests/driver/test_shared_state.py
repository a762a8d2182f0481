"""Which state the code of a node inside a model shares with its code around it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from raylight.driver.outer_sample import _stay
from raylight.driver.shared_state import owner_of_shared
from raylight.host import foreign_code

CALLS = 0
TABLE = {"scale": 2.0}


@pytest.fixture(autouse=True)
def _this_file_is_of_a_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign_code, "is_foreign_file", lambda path: path == __file__)


class Counter:
    def __init__(self) -> None:
        self.calls = 0

    def count(self, x: float) -> float:
        self.calls += 1
        return x

    def __call__(self, x: float) -> float:
        return x * self.calls


def _by_dict() -> tuple[Any, Any]:
    state = {"calls": 0}

    def around(x: float) -> float:
        state["calls"] += 1
        return x

    return (lambda x: x * state["calls"]), around


def _by_variable() -> tuple[Any, Any]:
    calls = 0

    def around(x: float) -> float:
        nonlocal calls
        calls += 1
        return x

    return (lambda x: x * calls), around


def _by_global() -> tuple[Any, Any]:
    def around(x: float) -> float:
        global CALLS
        CALLS += 1
        return x

    return (lambda x: x * CALLS), around


def _by_object() -> tuple[Any, Any]:
    counter = Counter()
    return counter, counter.count


def _by_result() -> tuple[Any, Any]:
    """The code inside is what writes."""
    kept: list[float] = []

    def inside(x: float) -> float:
        kept.append(x)
        return x

    return inside, lambda x: x + sum(kept)


def _in_a_partial() -> tuple[Any, Any]:
    state: list[float] = []
    return functools.partial(lambda kept, x: kept.append(x), state), lambda x: x * len(state)


def _by_global_dict() -> tuple[Any, Any]:
    def around(x: float) -> float:
        TABLE["scale"] += 1
        return x

    return (lambda x: x * TABLE["scale"]), around


@pytest.mark.parametrize(
    "made", [_by_dict, _by_variable, _by_global, _by_global_dict, _by_object, _by_result, _in_a_partial]
)
def test_finds_shared_state(made: Callable[[], tuple[Any, Any]]) -> None:
    inside, around = made()
    inside = {"dit": {("double_block", 0): inside}}
    assert owner_of_shared([inside], [{"sampler_post_cfg_function": [around]}]) is not None
    assert owner_of_shared([inside], [{"sampler_post_cfg_function": [made()[1]]}]) is None or made in (
        _by_global,
        _by_global_dict,
    )


def test_constants_are_no_state() -> None:
    scale, table = 2.0, {"scale": 2.0}

    def inside(x: float) -> float:
        return x * scale * table["scale"] * TABLE["scale"]

    def around(x: float) -> float:
        return x / scale / table["scale"] / TABLE["scale"]

    assert owner_of_shared([inside], [around]) is None


def test_a_node_of_its_own_state_shares_nothing() -> None:
    assert owner_of_shared([_by_dict()[0]], [_by_dict()[1], _by_object()[1]]) is None


def test_a_run_that_has_to_stay_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the node Count has code inside .* not possible: a ControlNet takes part"):
        _stay(Any, pytest.fail, lambda: "the node Count", "a ControlNet takes part")
