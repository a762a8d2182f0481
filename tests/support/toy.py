"""A small two-stream transformer with joint, cross and grouped attention, masks, tables aligned with tokens, and
modulation per frame.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from raylight.parallel.plan import Aligned, CrossAttention, Gather, SelfAttention, SequencePlan, Stream

JOINT = ("txt", "img")
WIDTH = 8

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor]


def plain_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Attend with q (B, H, S, D), k and v (B, HKV, S, D), by definition: no code is shared with what is tested."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        mask = mask[:, None] if mask.ndim == 3 else mask
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ v


class Joint(nn.Module):
    def __init__(self, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.q = nn.Linear(heads * WIDTH, heads * WIDTH)
        self.kv = nn.Linear(heads * WIDTH, 2 * kv_heads * WIDTH)

    def forward(
        self,
        txt: Tensor,
        img: Tensor,
        table: Tensor,
        frames: Tensor,
        attend: Attend,
        mask: Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        x = torch.cat([txt, img], dim=1) * table
        q = self.q(x).unflatten(-1, (self.heads, WIDTH)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2 * self.kv_heads, WIDTH)).transpose(1, 2).chunk(2, dim=1)
        out = attend(q, k, v, mask, scale).transpose(1, 2).flatten(2)
        if frames.shape[1] > 1:
            frames = frames.repeat_interleave(-(-img.shape[1] // frames.shape[1]), dim=1)[:, : img.shape[1]]
        img += out[:, txt.shape[1] :] * frames
        txt += out[:, : txt.shape[1]]
        return txt, img


class Cross(nn.Module):
    def forward(self, img: Tensor, context: Tensor, attend: Attend, mask: Tensor | None = None) -> Tensor:
        q, kv = (t.unflatten(-1, (-1, WIDTH)).transpose(1, 2) for t in (img, context))
        return img + attend(q, kv, kv, mask, None).transpose(1, 2).flatten(2)


class Toy(nn.Module):
    def __init__(self, heads: int = 5, kv_heads: int = 5) -> None:
        super().__init__()
        self.num_heads = heads
        self.blocks = nn.ModuleList([Joint(heads, kv_heads) for _ in range(2)])
        self.cross = Cross()
        self.head = nn.Linear(heads * WIDTH, 3)

    def forward(
        self,
        txt: Tensor,
        img: Tensor,
        table: Tensor,
        frames: Tensor,
        context: Tensor,
        attend: Attend,
        mask: Tensor | None = None,
        cross_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        for block in self.blocks:
            txt, img = block(txt, img, table=table, frames=frames, attend=attend, mask=mask, scale=scale)
        return self.head(self.cross(img, context, attend, cross_mask))


TOY_PLAN = SequencePlan(
    model="toy.Toy",
    inputs={
        "blocks.*": {
            "txt": Stream("txt"),
            "img": Stream("img"),
            "table": Aligned(JOINT),
            "frames": Aligned(("img",), expand=True),
        }
    },
    attention={"blocks.*": SelfAttention(JOINT), "cross": CrossAttention(("img",))},
    outputs={"head": Gather("img")},
)
