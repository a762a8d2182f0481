"""What the nodes call: load models on workers, sample them, end the workers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import comfy.sample
import comfy.sd
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher

from raylight.cluster import active_session
from raylight.host.loading import file_errors
from raylight.host.recipe import ModelRecipe, RayModel, WorkerConfig
from raylight.host.vae_file import map_vae
from raylight.host.vae_jobs import VaeRecipe
from raylight.host.worker_service import WorkerService

from . import weightless
from .advice import advise
from .batched_runs import run_batched
from .model_forward import forward_on_workers
from .model_import import copy_state_from, recipe_of
from .outer_sample import run_on_workers
from .remote_model import RemotePatcher
from .remote_vae import RemoteVAE
from .status import overview
from .workers import ask_with_room, begin, begin_ray, open_session

logger = logging.getLogger(__name__)

__all__ = [
    "advise",
    "begin",
    "begin_ray",
    "end_workers",
    "guided_by",
    "ksampler",
    "load",
    "load_vae",
    "overview",
    "parallelize",
    "parallelize_vae",
    "run_batched",
]


def load(model: RayModel) -> RemotePatcher:
    """Load a model on its workers, and return the MODEL that runs there.

    Raises ValueError for a model that the workers refuse; ConnectionError, RuntimeError or WorkerError if they cannot
    start.
    """
    return _load(model.workers, model.recipe)


def parallelize(model: ModelPatcher, workers: WorkerConfig) -> RemotePatcher:
    """Return the same MODEL on workers: weights, patches and options.

    Raises what `load` raises, and ValueError for a model that cannot be sent to workers.
    """
    patcher = _load(workers, recipe_of(model, workers))
    copy_state_from(model, patcher)
    return patcher


def load_vae(path: str, read: Callable[[], comfy.sd.VAE], workers: WorkerConfig) -> RemoteVAE:
    """Return the VAE of a file on workers, which load it when it is used. `read` has ComfyUI load it.

    Raises ValueError: for a file that is no VAE, or not all of one.
    """
    recipe = VaeRecipe.of_file(path, "")
    map_vae(recipe)
    with file_errors(recipe):
        return RemoteVAE.of(read(), workers, path)


def parallelize_vae(vae: comfy.sd.VAE, workers: WorkerConfig | None) -> comfy.sd.VAE:
    """Return the same VAE on workers; None for those that run when it is used. One of a node pack's class, which may
    decode in its own way, is returned as it is.

    Raises RuntimeError: it is none, because the checkpoint that it is from has none.
    """
    if type(vae) not in (comfy.sd.VAE, RemoteVAE):
        logger.info(
            "the VAE decodes and encodes in ComfyUI's process, as without workers: its class %s is not that of ComfyUI",
            type(vae).__qualname__,
        )
        return vae
    vae.throw_exception_if_invalid()
    return RemoteVAE.of(vae, workers)


def end_workers(with_ray: bool) -> None:
    """End the workers, and with `with_ray` also the Ray that Raylight started. Loading a model starts them again."""
    active_session.close(keep_ray=not with_ray)


def _load(workers: WorkerConfig, recipe: ModelRecipe) -> RemotePatcher:
    patcher = RemotePatcher.of(weightless.build(recipe, forward_on_workers), workers, recipe, run_on_workers)
    ask_with_room(open_session(workers), WorkerService.load, recipe, recipe)
    return patcher


def ksampler(
    *,
    noise: Any,
    ray_actors: RemotePatcher,
    latent_image: dict[str, Any],
    positive: list[Any],
    negative: list[Any],
    add_noise: str,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    start_at_step: int,
    end_at_step: int,
    return_with_leftover_noise: str,
    denoise: float = 1.0,
) -> dict[str, Any]:
    """Sample as ComfyUI's KSampler (Advanced), with a noise node's noise and its seed for the sampler. Return a
    LATENT.
    """
    ray_actors = ray_actors.clone()  # ComfyUI keeps a run's state on the patcher, and another run may begin within it
    samples = comfy.sample.fix_empty_latent_channels(
        ray_actors,
        latent_image["samples"],
        latent_image.get("downscale_ratio_spacial"),
        latent_image.get("downscale_ratio_temporal"),
    )
    disable_noise = add_noise == "disable"
    drawn = (
        torch.zeros(samples.size(), dtype=samples.dtype, layout=samples.layout, device="cpu")
        if disable_noise
        else noise.generate_noise({**latent_image, "samples": samples})
    )
    denoised = comfy.sample.sample(
        ray_actors,
        drawn,
        steps,
        cfg,
        sampler_name,
        scheduler,
        positive,
        negative,
        samples,
        denoise=denoise,
        disable_noise=disable_noise,
        start_step=start_at_step,
        last_step=end_at_step,
        force_full_denoise=return_with_leftover_noise == "disable",
        noise_mask=latent_image.get("noise_mask"),
        callback=latent_preview.prepare_callback(ray_actors, steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=noise.seed,
    )
    kept = {k: v for k, v in latent_image.items() if k not in ("downscale_ratio_spacial", "downscale_ratio_temporal")}
    return kept | {"samples": denoised}


def guided_by(guider: Any, model: RemotePatcher) -> Any:
    """Return a guider that samples `model`: the guider itself if its own model is on workers already, else a copy with
    the patches of its model.
    """
    if isinstance(guider.model_patcher, RemotePatcher):
        return guider
    patcher = model.clone()
    copy_state_from(guider.model_patcher, patcher)
    other = copy.copy(guider)
    other.model_patcher, other.model_options = patcher, patcher.model_options
    return other
