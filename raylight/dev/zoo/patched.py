"""Transformer patches that depend on all tokens at once, as nodes add them to a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .family import Draw

Call = Callable[[Draw], dict[str, Any]]


def _mixed(tokens: Tensor, dim: int = 1) -> Tensor:
    """Return values that differ for every token and depend on all of them."""
    place = torch.linspace(0.5, 1.5, tokens.shape[dim]).reshape(-1, *[1] * (tokens.ndim - 1 - dim))
    return tokens * place + 0.5 * tokens.flip(dim) + tokens.mean(dim, keepdim=True)


def after_block(arguments: dict[str, Any]) -> dict[str, Any]:
    """Change the arguments of a `double_block` patch in place, as ControlNets of model patches do."""
    for name in ("img", "txt"):
        if name in arguments:
            arguments[name][:] = _mixed(arguments[name])
    return arguments


def replaced_block(arguments: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Replace a `dit` block: run it on changed tokens, and change its output."""
    out = more["original_block"]({**arguments, "img": arguments["img"].flip(1)})
    return {name: _mixed(value) for name, value in out.items()}


def skipped_block(arguments: dict[str, Any], _: dict[str, Any]) -> dict[str, Any]:
    """Replace a `dit` block by nothing, as skip-layer guidance does."""
    return arguments


def before_attention(
    q: Tensor, k: Tensor, v: Tensor, pe: Tensor, attn_mask: Tensor | None, extra_options: dict[str, Any]
) -> dict[str, Any]:
    """Change q, k and v (B, heads, tokens, width) in an `attn1_patch`."""
    return {"q": q, "k": k, "v": _mixed(v, dim=2), "pe": pe, "attn_mask": attn_mask}


def after_attention(out: Tensor, extra_options: dict[str, Any]) -> Tensor:
    """Change only the image in an `attn1_output_patch`, as normalized attention guidance does."""
    start, stop = extra_options["img_slice"]
    out = out.clone()
    out[:, start:stop] = _mixed(out[:, start:stop])
    return out


def on_attention(arguments: dict[str, Any]) -> Tensor:
    """Patch Wan's attention: a dict in, tokens out."""
    return _mixed(arguments["x"])


def patched(call: Call, replaced: dict[tuple[str, int], Callable] | None = None, **patches: Callable) -> Call:
    """Return `call` with patches of these kinds, and blocks replaced."""

    def made(draw: Draw) -> dict[str, Any]:
        options: dict[str, Any] = {"patches": {kind: [patch] for kind, patch in patches.items()}}
        if replaced:
            options["patches_replace"] = {"dit": replaced}
        return call(draw) | {"transformer_options": options}

    return made


def joint_patches(call: Call, single_blocks: bool = True, after_blocks: bool = False) -> dict[str, Call]:
    """Return situations of a model with joint attention over text and image; few models call patches after blocks."""
    replaced = {("double_block", 0): replaced_block, ("double_block", 1): skipped_block}
    if single_blocks:
        replaced |= {("single_block", 0): replaced_block}
    return ({"patch after blocks": patched(call, double_block=after_block)} if after_blocks else {}) | {
        "replaced blocks": patched(call, replaced),
        "attention patches": patched(call, attn1_patch=before_attention, attn1_output_patch=after_attention),
    }
