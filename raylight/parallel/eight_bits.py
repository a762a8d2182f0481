"""Tensors of an exchange in 8 bits: int8 values and their scales in one tensor, so that one collective sends both.

Each vector of one token and head is divided into groups, by default 4, and each group has a scale of its own: one large
element makes the steps of its group coarse, not those of the others. The scales are bfloat16, which has the range of
float32, and take 8 bytes. Values are rounded with the scale as it is sent, so that its own rounding adds no error.
Integers of 8 bits because these are exact in every arithmetic of every GPU, and come closer than floats of 8 bits do:
within one group there is little range left for an exponent to cover.

An encoded tensor looks like one of more elements in its last dimension: what divides heads and tokens among ranks
works on it as it is.

Shapes: B batch rows, H heads, S tokens, D head size, W bytes of an encoded vector.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_GROUPS = 4
_SCALES_BYTES = 8  # keeps vectors in words of 8 bytes, in which they are copied
_LARGEST = 127
_LEAST_SCALE = 1e-30  # below, a group becomes zeros: its reciprocal is still finite
_PIECE_BYTES = 64 * 2**20  # of float32 values, which exist beside the tensor that is being encoded


def encode(tensor: Tensor) -> Tensor:
    """(B, H, S, D) of a dtype of up to 32 bits -> (B, H, S, W) int8, with each token's heads side by side in memory.

    A group with a value that is infinite or no number has such values afterwards, too.
    """
    batch, heads, tokens, width = tensor.shape
    # (B, H, S, D) -> (S, B, H, D)
    by_token = tensor.permute(2, 0, 1, 3)
    encoded = torch.empty((tokens, batch, heads, _encoded_width(width)), dtype=torch.int8, device=tensor.device)
    count = max(1, _PIECE_BYTES // max(1, 4 * batch * heads * width))
    for piece, place in zip(by_token.split(count), encoded.split(count), strict=True):
        _encode_piece(piece, place)
    return encoded.permute(1, 2, 0, 3)


def decode(encoded: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """(B, H, S, W) int8 -> (B, H, S, D) of this dtype, with D = `width`, and each token's heads side by side."""
    by_token = encoded.permute(2, 0, 1, 3)  # (S, B, H, W)
    groups = _groups(width)
    values = by_token[..., :width].unflatten(-1, (groups, -1))
    scales = _scales(by_token, groups).float().unsqueeze(-1)  # (S, B, H, groups, 1)
    result = torch.empty((*values.shape[:-2], width), dtype=dtype, device=encoded.device)
    torch.mul(values, scales, out=result.unflatten(-1, (groups, -1)))  # one kernel, with nothing in between in float32
    return result.permute(1, 2, 0, 3)


def _encode_piece(tensor: Tensor, encoded: Tensor) -> None:
    """Encode (S, B, H, D) into (S, B, H, W)."""
    width = tensor.shape[-1]
    groups = _groups(width)
    parts = tensor.unflatten(-1, (groups, -1))  # (S, B, H, groups, D / groups)
    largest = torch.linalg.vector_norm(parts, torch.inf, -1, dtype=torch.float32)
    scales = (largest / _LARGEST).clamp_min(_LEAST_SCALE).bfloat16()
    _scales(encoded, groups).copy_(scales)
    # A scale is rounded by up to 1/512, so that a value is 127.25 at most: rounding brings it back to 127.
    values = (parts * scales.float().reciprocal().unsqueeze(-1)).round_()
    encoded[..., :width].unflatten(-1, (groups, -1)).copy_(values)


def _scales(encoded: Tensor, groups: int) -> Tensor:
    """Return the scales in (..., W), a view: (..., groups) bfloat16."""
    start = encoded.shape[-1] - _SCALES_BYTES
    return encoded[..., start : start + 2 * groups].view(torch.bfloat16)


def _groups(width: int) -> int:
    """Return into how many groups a vector is divided: as many as divide it evenly."""
    return math.gcd(width, _GROUPS)


def _encoded_width(width: int) -> int:
    """Return W for D = `width`: its values, rounded up to words of 8 bytes, and the scales."""
    return -(-width // 8) * 8 + _SCALES_BYTES
