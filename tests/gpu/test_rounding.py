"""The rounding of a deep model on a GPU, whose kernels are others for parts of its tokens, and an error besides it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, gelu, layer_norm, scaled_dot_product_attention

from raylight.plans.draft.proof import difference
from raylight.worker.forward_kinds import changed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

WIDTH, HEADS, BLOCKS, CHANNELS = 1536, 12, 12, 16


class Block(nn.Module):
    """A block whose linear layers take the tokens of each shard by itself; so do the `neighbours`, if there are any."""

    def __init__(self, has_neighbours: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.neighbours = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH) if has_neighbours else None

    def forward(self, shards: list[Tensor]) -> list[Tensor]:
        heads = [
            [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(_normed(x)).chunk(3, -1)]
            for x in shards
        ]
        q, k, v = (torch.cat(parts, 2) for parts in zip(*heads, strict=True))
        half = HEADS // len(shards)  # as Ulysses has it
        attended = torch.cat(
            [
                scaled_dot_product_attention(*(one[:, first : first + half] for one in (q, k, v)))
                for first in range(0, HEADS, half)
            ],
            1,
        )
        sizes = [x.shape[1] for x in shards]
        parts = attended.transpose(1, 2).flatten(2).split(sizes, 1)
        shards = [x + self.out(part) for x, part in zip(shards, parts, strict=True)]
        if self.neighbours is not None:
            weight, bias = self.neighbours.weight, self.neighbours.bias
            shards = [
                x + conv1d(x.transpose(1, 2), weight, bias, padding=1, groups=WIDTH).transpose(1, 2) for x in shards
            ]
        return [x + self.down(gelu(self.up(_normed(x)))) for x in shards]


def _normed(x: Tensor) -> Tensor:
    return layer_norm(x, (WIDTH,))


class Deep(nn.Module):
    """A transformer of one stream; the last block may have `neighbours`."""

    def __init__(self, has_neighbours: bool) -> None:
        super().__init__()
        self.into, self.outof = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, CHANNELS)
        self.blocks = nn.ModuleList(Block(has_neighbours and index == BLOCKS - 1) for index in range(BLOCKS))

    def forward(self, x: Tensor, borders: tuple[int, ...] = ()) -> Tensor:
        shards = [self.into(x[:, first:last]) for first, last in pairwise((0, *borders, x.shape[1]))]
        for block in self.blocks:
            shards = block(shards)
        return torch.cat([self.outof(_normed(shard)) for shard in shards], 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [4097, 8192])
@pytest.mark.parametrize("has_neighbours", [False, True])
def test_rounding_passes_and_an_error_at_borders_does_not(
    has_neighbours: bool, tokens: int, dtype: torch.dtype, report_parity: Any
) -> None:
    torch.manual_seed(0)
    with torch.inference_mode(), torch.device("cuda"):
        model = Deep(has_neighbours).to(dtype)
        x = torch.randn(2, tokens, CHANNELS, dtype=dtype)
        whole, rounded = model(x), model(changed((x,), other=False, nudged=True)[0])
        for degree in (2, 4):
            split = model(x, tuple(-(-tokens * rank // degree) for rank in range(1, degree)))
            alone, measured = difference(whole, split), difference(whole, split, rounding=rounded)
            name = f"rounding, {tokens} tokens over {degree}, {dtype}" + (", wrong at borders" * has_neighbours)
            report_parity(f"{name:<60} {alone:.2f} of the limit, {measured:.2f} with measured rounding")
            assert (measured > 1) if has_neighbours else (measured <= 1)
