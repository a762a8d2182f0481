"""What a model file and a size mean in numbers: weights, tokens, attention, and memory to compute."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from raylight.parallel.estimate import Work
from raylight.parallel.hooks import matching
from raylight.parallel.plan import SelfAttention, SequencePlan, alternatives
from raylight.plans import plan_for

_TEXT_TOKENS = 512  # of a usual prompt, where they are attended to together with the picture's
_PATCH = 2  # rows and columns of a token, where the model does not say
# Weights that are not multiplied with every token: modulation, and those of the text.
_NOT_BY_TOKEN = re.compile(
    r"mod|ada_?ln|cross_attn\.(k|v)|attn2\.to_(k|v)|time|embed|txt|context|add_[qkv]|add_out", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class ModelSize:
    """A model at one size. `work` is of one batch row, None if its tokens cannot be split (`why_not`). `blocks` are the
    modules that FSDP gathers one after the other. `compute_bytes` is what ComfyUI expects one GPU to need beside the
    weights for a batch of one row.
    """

    name: str
    latent: tuple[int, ...]
    blocks: int
    compute_bytes: int
    work: Work | None
    independent_rows: bool = True
    why_not: str = ""


def measure(base: Any, width: int, height: int, frames: int) -> ModelSize:
    """Return the size of ComfyUI's model `base` for a picture or video. No weight is read.

    Raises ValueError: when the model makes neither.
    """
    model, config = base.diffusion_model, type(base.model_config).__name__
    latent = _latent(base.latent_format, width, height, frames)
    compute_bytes = int(base.memory_required(list(latent)))
    name = type(model).__name__
    try:
        plan = plan_for(model, config)
        work = _work(model, plan, latent)
    except ValueError as error:
        return ModelSize(name, latent, 1, compute_bytes, None, why_not=str(error))
    return ModelSize(name, latent, max(1, work.attentions), compute_bytes, work, plan.independent_rows)


def _latent(latent_format: Any, width: int, height: int, frames: int) -> tuple[int, ...]:
    """Return the shape of the latent, (1, C, [T,] H, W). Raises ValueError: when it has no height and width."""
    if latent_format.latent_dimensions < 2:
        raise ValueError("this model makes no pictures, so width and height say nothing about its work")
    spatial = [max(1, pixels // latent_format.spacial_downscale_ratio) for pixels in (height, width)]
    if latent_format.latent_dimensions == 3:
        spatial = [(frames - 1) // latent_format.temporal_downscale_ratio + 1, *spatial]
    return (1, latent_format.latent_channels, *spatial)


def _work(model: nn.Module, plan: SequencePlan, latent: tuple[int, ...]) -> Work:
    attentions = list(_attentions(model, plan))
    tokens = math.prod(
        -(-size // patch) for size, patch in zip(latent[2:], _patch(model, len(latent) - 2), strict=True)
    )
    if any(len(rule.streams) > 1 for rule, _ in attentions):
        tokens += _TEXT_TOKENS
    weights, widths = 0, Counter()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and not _NOT_BY_TOKEN.search(name):
            weights += parameter.numel()
            widths[parameter.shape[1]] += 1
    heads = plan.heads_of(model)
    width = widths.most_common(1)[0][0] if widths else 1
    return Work(tokens, weights, sum(calls for _, calls in attentions), width, heads)


def _attentions(model: nn.Module, plan: SequencePlan) -> Iterator[tuple[SelfAttention, int]]:
    """Yield for each module the rule of its attention over all tokens, and how many such calls it makes."""
    for path, kinds in plan.attention.items():
        rules = [rule for rule in alternatives(kinds) if isinstance(rule, SelfAttention)]
        for module in matching(model, path, plan):
            for rule in rules[:1]:
                yield rule, rule.calls(module) if callable(rule.calls) else rule.calls


def _patch(model: nn.Module, dimensions: int) -> tuple[int, ...]:
    """Return the size of a token in each dimension of the latent."""
    patchifier = getattr(model, "patchifier", None)  # of LTX-Video, which has no `patch_size`
    given: Any = getattr(model, "patch_size", getattr(patchifier, "_patch_size", _PATCH))
    sizes = tuple(given) if isinstance(given, (tuple, list)) else (int(given),) * min(dimensions, 2)
    return (1,) * (dimensions - len(sizes)) + sizes[-dimensions:]
