"""Link types of saved workflows, inputs of several nodes, the driver, and text on a node."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from types import ModuleType

import comfy.samplers
from comfy_api.latest import io, ui
from comfy_execution.utils import get_executing_context

from raylight.driver import preflight
from raylight.host.prompt_server import prompt_server
from raylight.host.recipe import WorkerConfig, stamp

logger = logging.getLogger(__name__)

CATEGORY = "Raylight"

RayActorsInit = io.Custom("RAY_ACTORS_INIT")
RayActors = io.Custom("RAY_ACTORS")
RayLora = io.Custom("RAY_LORA")
RayGuider = io.Custom("RAY_GUIDER")


def driver() -> ModuleType:
    """Import and return `raylight.driver.api`.

    Raises RuntimeError: a required package is missing; the message says what to install.
    """
    try:
        # Not at module scope: Ray and torch.distributed would slow every start of ComfyUI.
        from raylight.driver import api
    except ModuleNotFoundError as error:
        if error.name not in preflight.REQUIRED:
            raise
        raise RuntimeError(preflight.advice([error.name])) from error
    return api


def stamp_of(name: str | None, path_of: Callable[[str], str | None]) -> tuple[int, ...]:
    """Return what changes when another file is put under the same name. It is () for what is no file, and for a linked
    name, which is None before the node runs: an error would have ComfyUI run the node in every prompt.
    """
    path = None if name is None else path_of(name)
    return () if path is None else stamp(path)


def begin_workers(workers: WorkerConfig) -> None:
    """Start workers while ComfyUI goes on with other nodes. Does nothing outside of a prompt.

    The node that needs them waits for them, and raises what went wrong.
    """
    if get_executing_context() is None:
        return
    if f"{preflight.__package__}.api" in sys.modules:
        driver().begin(workers, replace=True)
    else:  # to import it takes seconds
        threading.Thread(target=_begin_first, args=(workers,), name="raylight-begin", daemon=True).start()


def _begin_first(workers: WorkerConfig) -> None:
    try:
        driver().begin(workers, replace=False)
    except Exception as error:  # the loader meets it too
        logger.debug("the workers were not started early: %s", error)


def show(node: type[io.ComfyNode], text: str) -> ui.PreviewText:
    """Write `text` on the running node and return it as the node's `ui`, for the prompt's history.

    The node's schema has to request `io.Hidden.unique_id`.
    """
    server = prompt_server()
    unique_id = None if node.hidden is None else node.hidden.unique_id
    if server is not None and unique_id is not None:
        server.send_progress_text(text, unique_id)
    return ui.PreviewText(text)


def workers_input(*, optional: bool) -> io.Input:
    """Return the input for the workers of an initializer."""
    default = " Without it: one worker per GPU." if optional else ""
    return RayActorsInit.Input(
        "ray_actors_init", optional=optional, tooltip=f"The workers, from a Ray Initializer.{default}"
    )


def model_input() -> io.Input:
    """Return the input for a model on workers."""
    return RayActors.Input("ray_actors", tooltip="The model on its workers, from a Ray loader.")


def seed_input() -> io.Input:
    """Return the input for the seed of the noise."""
    return io.Int.Input(
        "noise_seed",
        default=0,
        min=0,
        max=0xFFFFFFFFFFFFFFFF,
        control_after_generate=True,
        tooltip="Seed of the noise. The same seed gives the same image as ComfyUI's own sampler.",
    )


def cfg_input() -> io.Input:
    """Return the input for the guidance scale."""
    tooltip = "How closely to follow the prompt. At 1 the negative prompt is not computed."
    return io.Float.Input("cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip=tooltip)


def prompt_inputs() -> list[io.Input]:
    """Return the inputs for the positive and the negative prompt."""
    return [
        io.Conditioning.Input("positive", tooltip="The prompt: what to show."),
        io.Conditioning.Input("negative", tooltip="The negative prompt: what to leave out."),
    ]


def latent_input() -> io.Input:
    """Return the input for the latent to denoise."""
    return io.Latent.Input("latent_image", tooltip="The latent to denoise.")


def ksampler_inputs(*, seed: list[io.Input], noises: list[io.Input]) -> list[io.Input]:
    """Return the inputs of ComfyUI's KSampler (Advanced), in the order of saved workflows."""
    sampler = comfy.samplers.KSampler
    return [
        io.Combo.Input(
            "add_noise", options=["enable", "disable"], tooltip="Disable it to continue from another sampler."
        ),
        *seed,
        io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Number of denoising steps in total."),
        cfg_input(),
        io.Combo.Input("sampler_name", options=sampler.SAMPLERS, tooltip="The sampling algorithm."),
        io.Combo.Input("scheduler", options=sampler.SCHEDULERS, tooltip="How the noise level falls from step to step."),
        model_input(),
        *noises,
        *prompt_inputs(),
        latent_input(),
        io.Int.Input("start_at_step", default=0, min=0, max=10000, tooltip="The first step to run."),
        io.Int.Input("end_at_step", default=10000, min=0, max=10000, tooltip="Stop before this step."),
        io.Combo.Input(
            "return_with_leftover_noise",
            options=["disable", "enable"],
            tooltip="Keep the noise left at the end step, for a sampler that continues.",
        ),
        io.Float.Input(
            "denoise",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            tooltip="How much to denoise; below 1 keeps more of the latent.",
        ),
    ]
