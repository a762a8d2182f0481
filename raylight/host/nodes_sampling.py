"""What sampler nodes ask of ComfyUI's sampling that its own nodes do in one piece."""

from __future__ import annotations

import copy
from typing import Any

import comfy.sample
import comfy.utils
import latent_preview
import torch

from .parallelized import take_over
from .remote_patcher import RemotePatcher


def ksampler(*, noise: Any, ray_actors: RemotePatcher, latent_image: dict[str, Any], positive: list[Any],
             negative: list[Any], add_noise: str, steps: int, cfg: float, sampler_name: str, scheduler: str,
             start_at_step: int, end_at_step: int, return_with_leftover_noise: str,
             denoise: float = 1.0) -> dict[str, Any]:
    """ComfyUI's KSampler (Advanced) with a noise node's noise, and its seed for the sampler; returns a LATENT."""
    samples = comfy.sample.fix_empty_latent_channels(
        ray_actors, latent_image["samples"], latent_image.get("downscale_ratio_spacial"),
        latent_image.get("downscale_ratio_temporal"))
    disabled = add_noise == "disable"
    drawn = torch.zeros(samples.size(), dtype=samples.dtype, layout=samples.layout, device="cpu") if disabled else \
        noise.generate_noise({**latent_image, "samples": samples})
    denoised = comfy.sample.sample(
        ray_actors, drawn, steps, cfg, sampler_name, scheduler, positive, negative, samples, denoise=denoise,
        disable_noise=disabled, start_step=start_at_step, last_step=end_at_step,
        force_full_denoise=return_with_leftover_noise == "disable", noise_mask=latent_image.get("noise_mask"),
        callback=latent_preview.prepare_callback(ray_actors, steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=noise.seed)
    kept = {k: v for k, v in latent_image.items() if k not in ("downscale_ratio_spacial", "downscale_ratio_temporal")}
    return kept | {"samples": denoised}


def guided_by(guider: Any, model: RemotePatcher) -> Any:
    """A guider that samples `model`: the guider itself where its own model is on workers already, else a copy, with
    what nodes have put on its model."""
    if isinstance(guider.model_patcher, RemotePatcher):
        return guider
    patcher = model.clone()
    take_over(guider.model_patcher, patcher)
    other = copy.copy(guider)
    other.model_patcher, other.model_options = patcher, patcher.model_options
    return other
