"""Vectors in 8 bits: how close they are, what becomes of unusual values, and of views."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raylight.parallel import eight_bits
from raylight.parallel.eight_bits import decode, encode

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def there_and_back(tensor: Tensor) -> Tensor:
    return decode(encode(tensor), tensor.shape[-1], tensor.dtype)


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [128, 64, 40, 6, 7, 1])
def test_values_come_back(width: int, dtype: torch.dtype) -> None:
    tensor = torch.randn(2, 3, 50, width).to(dtype)
    encoded = encode(tensor)
    assert encoded.dtype == torch.int8 and encoded.shape[-1] == -(-width // 8) * 8 + 8
    actual = decode(encoded, width, dtype)
    assert actual.dtype == dtype and actual.shape == tensor.shape
    assert relative(actual, tensor) < 0.006
    # Encoded once more, as in a ring of Ulysses groups, they lose nothing worth speaking of.
    assert relative(there_and_back(actual), tensor) < 0.006


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_value_is_within_half_a_step(dtype: torch.dtype) -> None:
    tensor = torch.randn(1, 4, 300, 64).to(dtype)
    step = tensor.float().unflatten(-1, (4, -1)).abs().amax(-1, keepdim=True) / 127
    off = (there_and_back(tensor).float() - tensor.float()).unflatten(-1, (4, -1)).abs()
    rounding = 0 if dtype == torch.float32 else 127 * torch.finfo(dtype).eps / 2
    assert (off <= step * (0.5 * (1 + 1 / 256) + rounding)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_element_makes_only_its_group_coarse(dtype: torch.dtype) -> None:
    tensor = torch.randn(1, 4, 30, 64).to(dtype)
    before = there_and_back(tensor)
    tensor[..., 3] *= 100
    after = there_and_back(tensor)
    assert torch.equal(after[..., 16:], before[..., 16:])
    assert relative(after[..., 3], tensor[..., 3]) < 0.006


def test_any_size_and_sign() -> None:
    tensor = torch.randn(1, 1, 8, 32)
    for scale in (1e-20, 1e-6, 1.0, 1e4, 1e20, -3.0):
        assert relative(there_and_back(tensor * scale), tensor * scale) < 0.006
    assert torch.equal(there_and_back(torch.zeros(1, 1, 2, 32)), torch.zeros(1, 1, 2, 32))
    assert there_and_back(torch.zeros(2, 3, 0, 32)).shape == (2, 3, 0, 32)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(value: float) -> None:
    tensor = torch.randn(1, 1, 2, 64)
    tensor[0, 0, 0, 20] = value
    finite = there_and_back(tensor).isfinite()
    assert not finite[0, 0, 0, 20]
    assert finite[0, 0, 1].all() and finite[0, 0, 0, 32:].all()


def test_views_and_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(2, 40, 6, 16).transpose(1, 2)  # as a model has them: tokens first
    whole = encode(tensor)
    assert torch.equal(encode(tensor.contiguous()), whole)
    monkeypatch.setattr(eight_bits, "_PIECE_BYTES", 5 * 4 * tensor[:, :, 0].numel())
    assert torch.equal(encode(tensor), whole)
    monkeypatch.setattr(eight_bits, "_PIECE_BYTES", 1)
    assert torch.equal(encode(tensor), whole)
    selected = whole.index_select(1, torch.tensor([1, 1, 4]))
    assert torch.equal(decode(selected, 16, tensor.dtype), there_and_back(tensor)[:, [1, 1, 4]])


def test_is_compiled_whole() -> None:
    tensor = torch.randn(1, 4, 30, 64, dtype=torch.bfloat16)
    compiled = torch.compile(there_and_back, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(tensor), there_and_back(tensor))
