"""The template of Flux.2."""

from __future__ import annotations

from . import models, notes, parts
from .template import Mode, Template
from .workflow import Workflow

_DINER = (
    "A vintage motorcycle in front of a diner at sunset, orange and pink sky, glowing neon signs, photograph of the "
    "eighties, film grain, warm colors"
)


def _klein(workflow: Workflow) -> None:
    files = (models.FLUX2,)
    parts.note(
        workflow,
        "Flux.2 klein base 9B, text to image, on all GPUs",
        "All GPUs sample one image together: each has a part of its tokens. To edit images, encode them and add a "
        "ReferenceLatent for each behind both prompts.",
        (*files, models.QWEN3_8B, models.FLUX2_VAE),
        notes.usp(files, uses_cfg=True),
    )
    init = parts.workers(workflow)
    with workflow.group("Step 2 - Models", column=True):
        model = parts.as_model(workflow, models.FLUX2, init)
        clip = parts.text_encoder(workflow, "flux2", models.QWEN3_8B)
        decoder = parts.vae(workflow, models.FLUX2_VAE, init)
    prompts = parts.prompts(workflow, clip, _DINER, "")
    with workflow.group("Step 4 - Size"):
        latent = workflow.add("EmptyFlux2LatentImage", width=1024, height=1024)["LATENT"]
        # It needs the size, too: the larger the image, the more noise in the first steps.
        sigmas = workflow.add("Flux2Scheduler", title="Schedule for this size", width=1024, height=1024)["SIGMAS"]
    sampled = parts.sample_guided(workflow, model, prompts, sigmas, latent, cfg=5.0)
    parts.save_image(workflow, sampled, decoder, "flux2-klein")


TEMPLATES = (Template("flux2-klein-9b-usp", "Flux.2 klein 9B", "Text to image", Mode.USP, _klein),)
