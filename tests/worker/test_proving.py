"""Proofs in 16 bits: what differs at a few places is compared with the rounding of the model, which is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from unplanned_toys import toy_days

from raylight.dev.local_ranks import run_ranks, values
from raylight.parallel.plan import SequencePlan
from raylight.worker.forward_kinds import changed
from raylight.worker.proving import WHOLE, Forward, Inputs, Way

TOKENS, CHANNELS = 1024, 16


class Model:
    """What one rank computes: a model whose last tokens are rounded much more than others, with an `error` of its split
    at a border. `forwards` are those that it was asked for.
    """

    def __init__(self, error: float = 0.0, nudged: Exception | None = None) -> None:
        torch.manual_seed(0)
        self.exact, self.error, self.nudged = torch.randn(1, TOKENS, CHANNELS), error, nudged
        self.rounding = torch.full((TOKENS, 1), 2e-3)
        self.rounding[-20:] = 0.03
        self.forwards: list[tuple[bool, Inputs]] = []
        self.whole = self.output()

    def output(self) -> Tensor:
        return (self.exact + self.rounding * torch.randn(self.exact.shape)).bfloat16()

    def compute(self, way: Way, rank: int | None, inputs: Inputs) -> Any:
        if rank is None:
            self.forwards.append((way == WHOLE, inputs))
        if inputs.nudged and self.nudged is not None:
            raise self.nudged
        output = self.output()
        if way != WHOLE:
            output[:, TOKENS // 2 - 1 : TOKENS // 2 + 1] += self.error
        return output

    def prove(self, in_16_bits: bool = True, ways: int = 1) -> Any:
        ways_ = [Way(SequencePlan(f"toy {index}", {}, {}, {})) for index in range(ways)]
        return Forward(self.compute, lambda: None, self.whole, 2, in_16_bits).prove(ways_)


def test_uneven_rounding_is_measured_and_allowed() -> None:
    model = Model()
    outcome = model.prove()
    assert outcome.way is not None and outcome.share <= 1
    came, other = Inputs(), Inputs(other=True)
    assert model.forwards == [
        (False, came),
        (True, Inputs(nudged=True)),
        (True, other),
        (False, other),
        (True, Inputs(other=True, nudged=True)),
    ]


def test_an_error_at_a_border_is_none_of_it_and_rounding_is_measured_once() -> None:
    model = Model(error=0.08)
    outcome = model.prove(ways=3)
    assert outcome.way is None and "its output differs" in outcome.reason
    assert model.forwards.count((True, Inputs(nudged=True))) == 1


def test_what_is_wrong_on_the_whole_measures_nothing() -> None:
    model = Model(error=4.0)
    assert model.prove().way is None
    assert model.forwards == [(False, Inputs())]


def test_an_error_while_rounding_is_measured_is_no_proof() -> None:
    outcome = Model(nudged=ValueError("no such latent")).prove()
    assert outcome.way is None and "no such latent" in outcome.reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_nudged_latent_differs_in_few_last_bits(dtype: torch.dtype) -> None:
    latent = torch.randn(2, 64, 32).to(dtype)
    same, time = latent.clone(), torch.ones(1, dtype=dtype)
    for value in (latent, latent.transpose(1, 2)):
        nudged, after = changed((value, time), other=False, nudged=True)
        share = (nudged.float() - value.float()).abs() / value.float().abs()
        assert after is time
        assert 0.1 < (share > 0).float().mean() < 0.15
        assert share.max() <= torch.finfo(dtype).eps
        assert torch.equal(nudged, changed((value, time), False, True)[0]), "the same on all ranks"
    assert torch.equal(latent, same)
    (images, again), _ = changed(([latent, latent.float()], time), other=False, nudged=True)
    assert not torch.equal(images, latent) and torch.equal(again, latent.float())


def test_toys_in_bfloat16(tmp_path: Path) -> None:
    # One border of two shards: two wrong tokens of 4096 are 0.8 % of the norm.
    cases = [
        (flaw, lengths, torch.bfloat16, tmp_path / f"{flaw}.json")
        for flaw, lengths in (("convolution", (4096, 4096)), ("", (4097, 4097, 1000)))
    ]
    for wrong, right in values(run_ranks(2, toy_days, cases, timeout_s=200)):
        assert wrong.plans == 0 and wrong.exchanges[1] == 0
        assert "its output differs" in wrong.said[0]
        assert right.plans == 2 and right.exchanges[1]
        assert max(wrong.error, right.error) <= 0.1
