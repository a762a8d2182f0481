from __future__ import annotations

import pytest

from raylight.parallel.rows.convolution import Window
from raylight.parallel.rows.layout import Cuts, cut


def test_cuts_are_even_multiples_of_a_unit() -> None:
    assert cut(11, 4).sizes == (3, 3, 3, 2)
    assert cut(90, 4, 8).bounds == (0, 24, 48, 72, 90)


def test_scaling_is_inverted() -> None:
    assert cut(11, 3).scaled(8).divided(8) == cut(11, 3)


def test_rejects_a_cut_within_a_row() -> None:
    with pytest.raises(ValueError, match="would fall into a row"):
        Cuts((0, 3, 8)).divided(2)


@pytest.mark.parametrize(("reach", "stride", "padding"), [(2, 1, 1), (2, 2, 1), (1, 2, 0), (3, 2, 1), (0, 1, 0)])
def test_an_output_is_cut_where_the_input_is(reach: int, stride: int, padding: int) -> None:
    assert Window(reach, stride, padding).output(cut(32, 4)) == cut(32 // stride, 4)


def test_a_window_needs_half_a_kernel_around_its_rows() -> None:
    assert Window(2, 1, 1).need((8, 16)) == (7, 17)
    assert Window(2, 2, 1).need((4, 8)) == (7, 16)
