"""What a proof in 16 bits tells apart: rounding, however it is spread, and errors at a few places of an output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from raylight.plans.draft.proof import difference, may_be_rounding

ROUNDING = 4e-3  # of the standard deviation: that of a deep model in bfloat16
SPREAD = 0.8  # of the logarithm of how much places round: a factor of 20 between the first and the last of 4096
# By where the tokens are: the shape of an output, its axes of tokens, and that of its channels.
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int]] = {
    "tokens": ((1, 4097, 16), (1,), 2),
    "a batch": ((2, 1024, 64), (1,), 2),
    "an image": ((1, 16, 64, 96), (2, 3), 1),
    "a video": ((2, 16, 5, 16, 24), (2, 3, 4), 1),
}

Scale = Callable[[str], "Tensor | float"]


def _field(layout: str, axes: tuple[int, ...]) -> Tensor:
    """Return a positive factor for each index of these axes, with a heavy tail."""
    shape = LAYOUTS[layout][0]
    return (SPREAD * torch.randn([size if axis in axes else 1 for axis, size in enumerate(shape)])).exp()


# By what they are: how much rounding does at each place.
SCALES: dict[str, Scale] = {
    "alike": lambda layout: 1.0,
    "by token": lambda layout: _field(layout, LAYOUTS[layout][1]),
    "by channel": lambda layout: _field(layout, (LAYOUTS[layout][2],)),
    "by both": lambda layout: _field(layout, LAYOUTS[layout][1]) * _field(layout, (LAYOUTS[layout][2],)),
    "by row": lambda layout: _field(layout, (0,)),
    "massive tokens": lambda layout: 1 + 29 * (_field(layout, LAYOUTS[layout][1]) > 6),
}


class Outputs:
    """The outputs of a model that rounds to 16 bits: whole, split right, and whole with other rounding."""

    def __init__(self, layout: str, scale: str, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
        torch.manual_seed(seed)
        shape, _, self.channels = LAYOUTS[layout]
        factors = SCALES[scale](layout)
        exact = torch.randn(shape) * (factors if scale == "massive tokens" else 1.0)
        rounding = ROUNDING * factors
        if scale != "massive tokens":
            rounding = rounding / torch.as_tensor(factors).square().mean().sqrt()
        self.whole, self.split, self.rounded = ((exact + rounding * torch.randn(shape)).to(dtype) for _ in range(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rounding_is_allowed_however_it_is_spread(layout: str, scale: str, dtype: torch.dtype) -> None:
    for seed in range(4):
        made = Outputs(layout, scale, seed, dtype)
        assert difference(made.whole, made.split, rounding=made.rounded) < 1
        if scale == "alike":
            assert difference(made.whole, made.split) < 1


# By what is wrong: the rows, tokens and channels, and by how much of the standard deviation.
ALL = slice(None)
ERRORS: dict[str, tuple[Callable[[int], tuple[Any, ...]], float]] = {
    "both sides of a border": (lambda tokens: (ALL, slice(tokens // 2 - 1, tokens // 2 + 1)), 0.3),
    "5 % at three tokens": (lambda tokens: (0, slice(tokens // 2 - 1, tokens // 2 + 2)), 0.05),
    "the last token": (lambda tokens: (ALL, -1), 0.08),
    "the first token of one row": (lambda tokens: (-1, 0), 0.08),
    "one token of every shard": (lambda tokens: (ALL, slice(None, None, tokens // 8)), 0.06),
    "one channel": (lambda tokens: (ALL, ALL, 5), 0.03),
    "one channel at a border": (lambda tokens: (ALL, slice(tokens // 2 - 2, tokens // 2 + 2), 5), 0.2),
    "one value": (lambda tokens: (0, tokens // 2, slice(1, 2)), 0.4),
    "half of the tokens": (lambda tokens: (ALL, slice(tokens // 2, None)), 0.02),
}


def with_error(made: Outputs, kind: str) -> Tensor:
    """Return the split output with an error of this kind, which is random besides its size."""
    moved = made.split.float().movedim(made.channels, -1)
    values = moved.flatten(1, -2).clone()
    where, size = ERRORS[kind]
    error = torch.zeros_like(values)
    place = where(values.shape[1])
    error[place] = torch.randn_like(error[place])
    error *= size * made.whole.float().std() / error[place].square().mean().sqrt()
    return (values + error).reshape(moved.shape).movedim(-1, made.channels).to(made.split.dtype)


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_error_at_a_few_places_is_found(layout: str, kind: str) -> None:
    for seed in range(3):
        made = Outputs(layout, "alike", seed)
        wrong = with_error(made, kind)
        assert difference(made.whole, wrong) > 1
        assert difference(made.whole, wrong, rounding=made.rounded) > 1


def test_an_error_in_one_row_is_found() -> None:
    # At all tokens of it: 0.5 % of the norm of all rows, where rounding is 0.05 %.
    torch.manual_seed(0)
    made = Outputs("a batch", "alike", dtype=torch.float16)
    made.split = made.whole + (5e-4 * torch.randn(made.whole.shape)).half()
    assert difference(made.whole, made.split) < 1
    made.split[1] += (7e-3 * torch.randn(made.whole.shape[1:])).half()
    assert difference(made.whole, made.split) > 1


@pytest.mark.parametrize("scale", ["by token", "by channel", "massive tokens"])
def test_an_error_at_a_border_is_found_where_rounding_is_uneven(scale: str) -> None:
    for layout in LAYOUTS:
        made = Outputs(layout, scale)
        assert difference(made.whole, with_error(made, "both sides of a border"), rounding=made.rounded) > 1


def test_rounding_that_is_much_or_unlike_allows_nothing() -> None:
    made = Outputs("an image", "alike")
    wrong = with_error(made, "both sides of a border")
    far = made.whole + torch.randn(made.whole.shape).bfloat16()
    for rounded in (far, made.whole[:, :, 1:], made.whole * torch.nan):
        assert difference(made.whole, wrong, rounding=rounded) > 1
    assert difference([made.whole] * 2, [made.split, wrong], rounding=[made.rounded] * 2) > 1
    assert difference([made.whole] * 2, [made.split] * 2, rounding=[made.rounded] * 2) < 1


@pytest.mark.parametrize(
    ("rounding", "error", "is_right"), [(1e-2, 0.0, True), (1e-2, 1.5e-2, False), (3e-2, 0.0, False)]
)
def test_what_many_layers_round_is_allowed_once_it_is_measured(rounding: float, error: float, is_right: bool) -> None:
    torch.manual_seed(0)
    exact = torch.randn(2, 1024, 64)
    whole, split, rounded = ((exact + rounding * torch.randn(exact.shape)).bfloat16() for _ in range(3))
    split = (split + error * torch.randn(exact.shape)).bfloat16()
    assert difference(whole, split) > 1
    assert may_be_rounding(whole, split) == (rounding < 3e-2)
    assert (difference(whole, split, rounding=rounded) < 1) == is_right
