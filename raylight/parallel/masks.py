"""Attention masks over the tokens of one rank, or of all ranks in the order in which an exchange gathers them.

Each rank holds `[txt_r, img_r]`, so gathered tokens come rank by rank and not stream by stream.

Shapes: S tokens on all ranks, S_LOCAL on this one, Sk keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .tokens import TokenState


def local_mask(tokens: TokenState, mask: Tensor, streams: Sequence[str]) -> Tensor:
    """Return a mask of this rank's queries: (B|1, H|1, S|1, Sk) -> (B|1, H|1, S_LOCAL|1, Sk)."""
    if mask.shape[-2] == 1:
        return mask
    return torch.cat([mask[..., start:stop, :] for start, stop in tokens.spans(streams, tokens.rank)], dim=-2)


def gathered_mask(tokens: TokenState, mask: Tensor, streams: Sequence[str]) -> Tensor:
    """Return a mask (B|1, H|1, S|1, S) in the order in which an all-to-all gathers the ranks' tokens.

    Raises RuntimeError: when the mask does not fit the tokens of `streams`.
    """
    total = tokens.total(streams)
    if mask.shape[-1] != total or mask.shape[-2] not in (1, total):
        raise RuntimeError(f"an attention mask of shape {tuple(mask.shape)} does not fit {total} tokens")

    def permute() -> tuple[Tensor, Tensor]:
        order = rank_order(tokens, streams, mask.device)
        permuted = mask.index_select(-1, order)
        return mask, permuted if mask.shape[-2] == 1 else permuted.index_select(-2, order)

    return tokens.kept((id(mask), tuple(streams)), permute)[1]


def rank_order(tokens: TokenState, streams: Sequence[str], device: torch.device) -> Tensor:
    """Return the index (S,), int64, that takes the concatenated full streams to the order of gathered tokens."""
    return torch.cat(
        [
            torch.arange(start, start + tokens.sizes(name)[rank], device=device)
            for rank in range(tokens.degree)
            for name, (start, _) in zip(streams, tokens.spans(streams, rank), strict=True)
        ]
    )
