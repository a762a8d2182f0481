"""The side of a run that stays in ComfyUI's process: noise, progress, previews, cancel."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.utils
import latent_preview
import torch
from comfy.cli_args import LatentPreviewMethod, args
from tqdm.auto import tqdm

from raylight.cluster import current
from raylight.cluster.errors import RunCancelled, WorkerError
from raylight.cluster.session import Session

from . import boot, presence
from .conditioning import portable
from .handles import RayModel, Workers
from .job import SampleJob, StepDone
from .model import ModelInfo

logger = logging.getLogger(__name__)


def load(model: RayModel) -> ModelInfo:
    """Have the model loaded on the workers. Raises ValueError for a model that they refuse."""
    return _run(_session(model.workers), "load", model.recipe)


def sample(model: RayModel, latent: dict[str, Any], positive: list[Any], negative: list[Any], *, seed: int, steps: int,
           cfg: float, sampler_name: str, scheduler: str, denoise: float, disable_noise: bool,
           start_step: int | None, last_step: int | None, force_full_denoise: bool) -> dict[str, Any]:
    """Sample on the workers as ComfyUI's KSampler does in its own process; returns a LATENT.

    Noise is drawn here, so it is what one process would draw. Raises ValueError for conditioning that cannot
    travel, and ComfyUI's interrupt when the person cancels.
    """
    positive, negative = portable(positive, "positive"), portable(negative, "negative")
    session = _session(model.workers)
    info = _run(session, "load", model.recipe)

    # All that ComfyUI's helpers for noise and previews read of a model.
    stand_in = SimpleNamespace(
        load_device=torch.device("cpu"), model=info, get_model_object=lambda name: getattr(info, name)
    )
    latent_image = comfy.sample.fix_empty_latent_channels(
        stand_in, latent["samples"], latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal")
    )
    if disable_noise:
        noise = torch.zeros(latent_image.size(), dtype=latent_image.dtype, layout=latent_image.layout, device="cpu")
    else:
        noise = comfy.sample.prepare_noise(latent_image, seed, latent.get("batch_index"))
    noise_mask = latent.get("noise_mask")
    job = SampleJob(
        recipe=model.recipe, attention=model.workers.attention, strategy=model.workers.strategy,
        noise=noise, latent_image=latent_image.cpu(),
        noise_mask=None if noise_mask is None else noise_mask.cpu(), positive=positive, negative=negative, seed=seed,
        steps=steps, cfg=cfg, sampler_name=sampler_name, scheduler=scheduler, denoise=denoise,
        disable_noise=disable_noise, start_step=start_step, last_step=last_step,
        force_full_denoise=force_full_denoise, rng_state=torch.get_rng_state(),
        free_memory_after=model.workers.free_memory_after,
        wants_preview=args.preview_method != LatentPreviewMethod.NoPreviews,
    )
    show = latent_preview.prepare_callback(stand_in, steps)

    with tqdm(disable=not comfy.utils.PROGRESS_BAR_ENABLED) as bar:

        def on_event(event: StepDone) -> None:
            bar.total = event.total
            bar.update(event.step + 1 - bar.n)
            show(event.step, event.preview, None, event.total)

        samples = _run(session, "sample", job, on_event=on_event)
    samples = samples.to(
        device=comfy.model_management.intermediate_device(), dtype=comfy.model_management.intermediate_dtype()
    )
    out = {k: v for k, v in latent.items() if k not in ("downscale_ratio_spacial", "downscale_ratio_temporal")}
    return out | {"samples": samples}


def _session(workers: Workers) -> Session:
    """The workers' session, started now if it is not running."""
    if workers.config.device_type == "cuda":
        # Workers share these GPUs with ComfyUI; neither sees what the other could give back.
        presence.unload_others()
    session = current.session(workers.config, boot.service_spec())
    presence.announce(_free)
    return session


def _free() -> None:
    """Have the workers, if there are any, let go of their models."""
    session = current.running()
    if session is None:
        return
    try:
        session.run("free")
    except (WorkerError, RunCancelled, ValueError) as error:
        logger.warning("the workers could not free their memory: %s", error)
    else:
        logger.info("the workers have let go of their models")


def _run(session: Session, method: str, *arguments: Any, on_event: Any = None) -> Any:
    try:
        return session.run(
            method, *arguments, on_event=on_event, wants_cancel=comfy.model_management.processing_interrupted
        )
    except RunCancelled:
        comfy.model_management.throw_exception_if_processing_interrupted()
        raise comfy.model_management.InterruptProcessingException() from None
