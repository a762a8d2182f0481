"""Attention with a log-sum-exp, and merging two halves of the keys."""

from __future__ import annotations

import pytest
import torch
from toy import plain_kernel

from raylight.attention import torch_kernels
from raylight.attention.kernels import kernel

NAMES = ["TORCH", "TORCH_FLASH", "TORCH_EFFICIENT"]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


MASKS = {"none": None, "additive": draw(2, 1, 7, 11), "keys": draw(2, 1, 1, 11), "boolean": draw(1, 4, 7, 11) > -0.5}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("scale", [None, 0.2])
def test_attention_to_halves_of_the_keys_merges_to_all(name: str, mask: str, scale: float | None) -> None:
    q, k, v = draw(2, 4, 7, 8), draw(2, 2, 11, 8), draw(2, 2, 11, 8) + 1
    parts = []
    for columns in (slice(0, 4), slice(4, 11)):
        part = None if MASKS[mask] is None else MASKS[mask][..., columns]
        parts.append(kernel(name).with_lse(q, k[:, :, columns], v[:, :, columns], part, scale))
    out, _ = torch_kernels.merge(parts[0][0], parts[0][1], *parts[1])
    torch.testing.assert_close(out, plain_kernel(q, k, v, MASKS[mask], scale), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_lse_is_true(name: str) -> None:
    q, k, v = draw(1, 2, 5, 8), draw(1, 2, 9, 8), draw(1, 2, 9, 8)
    expected = (q @ k.transpose(-1, -2) * 8**-0.5).logsumexp(-1)
    torch.testing.assert_close(kernel(name).with_lse(q, k, v, None, None)[1], expected, rtol=1e-5, atol=1e-5)


def test_a_block_with_every_key_masked_has_no_weight() -> None:
    q, k, v = draw(1, 1, 3, 4), draw(1, 1, 6, 4), draw(1, 1, 6, 4)
    mask = torch.tensor([False] * 3 + [True] * 3).view(1, 1, 1, 6)
    parts = [
        torch_kernels.reference_attention(q, k[:, :, c], v[:, :, c], mask[..., c], None)
        for c in (slice(0, 3), slice(3, 6))
    ]
    assert torch.isinf(parts[0][1]).all() and not parts[0][0].isnan().any()
    out, _ = torch_kernels.merge(*parts[0], *parts[1])
    torch.testing.assert_close(out, plain_kernel(q, k, v, mask, None))


def test_many_queries_are_done_in_chunks() -> None:
    q, k = draw(1, 1, 2 * torch_kernels.QUERY_CHUNK + 3, 4), draw(1, 1, 5, 4)
    mask = draw(1, 1, q.shape[2], 5)
    out, _ = torch_kernels.reference_attention(q, k, k, mask, None)
    torch.testing.assert_close(out, plain_kernel(q, k, k, mask, None))


@pytest.mark.parametrize("name", NAMES)
def test_kernels_equal_the_definition(name: str) -> None:
    q, k, v = draw(2, 4, 7, 8), draw(2, 2, 11, 8), draw(2, 2, 11, 8)
    torch.testing.assert_close(
        kernel(name)(q, k, v, MASKS["additive"], 0.3),
        plain_kernel(q, k, v, MASKS["additive"], 0.3),
        rtol=1e-5,
        atol=1e-5,
    )
