"""Exchanges in 8 bits on real gloo ranks: their error, their bytes, and what a meter says of the error."""

from __future__ import annotations

import functools
import re

import pytest
from eight_bit_cases import CALLS, Outcome, compiled, measured, outcomes, unmeasured

from raylight.dev.local_ranks import run_ranks, values

LARGEST = 2e-2


@functools.cache
def results(world: int, ring: int = 1, chunks: int = 1) -> list[dict[str, Outcome]]:
    return values(run_ranks(world, outcomes, ring, chunks))


@pytest.mark.parametrize(("world", "ring", "chunks"), [(2, 1, 1), (3, 1, 1), (2, 1, 2), (2, 2, 1), (4, 2, 1)])
@pytest.mark.parametrize("name", CALLS)
def test_the_error_is_small_and_so_are_the_bytes(name: str, world: int, ring: int, chunks: int) -> None:
    call = CALLS[name]
    of_all = [report[name] for report in results(world, ring, chunks)]
    for one in of_all:
        assert one.error < LARGEST
        assert one.exact_error < (1e-5 if call.dtype.itemsize == 4 else 1e-2), "an exact exchange has an error"
    assert max(one.error for one in of_all) > 1e-3, "nothing was in 8 bits"
    sent, exact = (sum(getattr(one, key) for one in of_all) for key in ("sent_bytes", "exact_bytes"))
    per_vector = -(-call.width // 8) * 8 + 8
    assert sent / exact == pytest.approx(per_vector / (call.width * call.dtype.itemsize), rel=0.01)


@pytest.mark.parametrize(("world", "ring", "both"), [(2, 1, 2), (3, 3, 2), (4, 2, 2)])
def test_the_error_is_measured_in_a_few_calls_of_a_first_forward(world: int, ring: int, both: int) -> None:
    for text, counts, inputs in values(run_ranks(world, measured, ring)):
        # Those calls are made twice, once by an exact exchange.
        assert counts == [both, both, 1, both, 1, 1, 1, both, 1, 1]
        assert re.fullmatch(
            r"changed what attention gets by 0\.\d\d% \(at most 0\.\d\d%\), and its result by \d\.\d\d% \(at most "
            r"\d\.\d\d%\)",
            text,
        )
        assert 0.003 < inputs < 0.008


def test_without_calls_or_tokens_there_is_no_error() -> None:
    assert values(run_ranks(2, unmeasured)) == [[False, False, True], [False, False, False]]


@pytest.mark.slow
def test_ranks_measure_alike_where_a_model_is_compiled() -> None:
    assert values(run_ranks(2, compiled)) == [(True, 2)] * 2
