"""What travels to the workers for one run of a sampler, and what comes back while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .recipe import ModelRecipe


@dataclass(frozen=True, slots=True)
class SampleJob:
    """One run of ComfyUI's KSampler (Advanced). Tensors are on the CPU; latents are (B, C, [T,] H, W).

    `rng_state` is the driver's CPU generator after it drew `noise`: samplers that draw more noise from
    the global generator go on from there, as they do in one process.
    """

    recipe: ModelRecipe
    attention: str
    strategy: str
    noise: Tensor
    latent_image: Tensor
    noise_mask: Tensor | None
    positive: list[Any]
    negative: list[Any]
    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    denoise: float
    disable_noise: bool
    start_step: int | None
    last_step: int | None
    force_full_denoise: bool
    rng_state: Tensor
    free_memory_after: bool
    wants_preview: bool


@dataclass(frozen=True, slots=True)
class StepDone:
    """Step `step` (from 0) of `total` has ended. `preview` is what a previewer looks at: the first image of the batch
    and, of a video, its first frame; None when no preview is wanted."""

    step: int
    total: int
    preview: Tensor | None
