"""ComfyUI's own sampling, run in a worker."""

from __future__ import annotations

import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from raylight.cluster.actor import Run

from .job import SampleJob, StepDone
from .recipe import WHOLE


def sample(run: Run, patcher: ModelPatcher, job: SampleJob) -> Tensor:
    """Sample a job on this rank; the same on every rank of the sequence. Returns the latent on the CPU.

    In inference mode as ComfyUI does, but for split weights: not every version of FSDP2 can be used in it.

    Raises RunCancelled at the first step boundary after a cancel.
    """
    torch.manual_seed(job.seed)  # every device's generator; the CPU's goes on from the driver's
    torch.set_rng_state(job.rng_state)

    def after_step(step: int, x0: Tensor, x: Tensor, total: int) -> None:
        run.emit(StepDone(step, total, _for_preview(x0) if job.wants_preview and run.rank == 0 else None))
        run.check_cancelled()

    with torch.inference_mode() if job.recipe.sharding == WHOLE else torch.no_grad():
        samples = comfy.sample.sample(
            patcher, job.noise, job.steps, job.cfg, job.sampler_name, job.scheduler, job.positive, job.negative,
            job.latent_image, denoise=job.denoise, disable_noise=job.disable_noise, start_step=job.start_step,
            last_step=job.last_step, force_full_denoise=job.force_full_denoise, noise_mask=job.noise_mask,
            callback=after_step, disable_pbar=True, seed=job.seed,
        )
    return samples.cpu()


def _for_preview(x0: Tensor) -> Tensor:
    """(1, C, 1, H, W) or (1, C, H, W), float32 on the CPU."""
    first = x0[:1, :, :1] if x0.ndim == 5 else x0[:1]
    return first.detach().to("cpu", torch.float32, copy=True)
