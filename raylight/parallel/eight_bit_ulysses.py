"""Ulysses attention whose exchanges are in 8 bits: queries, keys and values before attention, and its result after it.

Each is encoded on the rank that has it, and decoded on the rank that gets it; attention computes in the model's dtype.
Shapes as in `ulysses`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .eight_bits import decode, encode
from .sequence_attention import Kernel
from .ulysses import UlyssesAttention


class EightBitUlysses(UlyssesAttention):
    """As `UlyssesAttention`, in 8 bits."""

    def __call__(
        self,
        kernel: Kernel,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int],
        mask: Tensor | None,
        scale: float | None,
    ) -> Tensor:
        """As `Strategy`. Raises as `UlyssesAttention`."""
        if self._degree == 1:
            return kernel(q, k, v, mask, scale)
        dtype, widths, result_width = q.dtype, [t.shape[3] for t in (q, k, v)], v.shape[3]

        def on_encoded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
            # (B, heads, S, W) int8 -> (B, heads, S, D)
            q, k, v = (decode(one, width, dtype) for one, width in zip((q, k, v), widths, strict=True))
            return encode(kernel(q, k, v, mask, scale))

        # (B, heads, S_LOCAL, D) -> (B, heads, S_LOCAL, W) int8
        out = super().__call__(on_encoded, encode(q), encode(k), encode(v), lengths, mask, scale)
        return decode(out, result_width, dtype)
