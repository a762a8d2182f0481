"""The template of Chroma."""

from __future__ import annotations

from . import models, notes, parts
from .template import Mode, Template
from .workflow import Workflow

_TIGER = (
    "Documentary close-up photograph of a tiger's eye, every hair of the fur around it is sharp, the forest is "
    'reflected in the pupil, the title "CHROMA" stands across the image in white letters'
)
_BAD = (
    "This low quality greyscale sketch is unfinished and inaccurate, very blurred and without detail, with chromatic "
    "aberrations, artifacts, oversaturated colors, bloom, bold outlines and flat colors."
)


def _hd(workflow: Workflow) -> None:
    files = (models.CHROMA,)
    parts.note(
        workflow,
        "Chroma1 HD, text to image, on all GPUs",
        "All GPUs sample one image together: each has a part of its tokens.",
        (*files, models.T5_FP8, models.FLUX_VAE),
        notes.usp(files, uses_cfg=True),
    )
    init = parts.workers(workflow)
    with workflow.group("Step 2 - Models", column=True):
        model = parts.as_model(workflow, models.CHROMA, init)
        model = workflow.add("ModelSamplingAuraFlow", model=model, shift=1.0)["MODEL"]
        clip = parts.text_encoder(workflow, "chroma", models.T5_FP8)
        clip = workflow.add("T5TokenizerOptions", clip=clip)["CLIP"]
        decoder = parts.vae(workflow, models.FLUX_VAE, init)
    positive, negative = parts.prompts(workflow, clip, _TIGER, _BAD)
    with workflow.group("Step 4 - Size"):
        latent = workflow.add("EmptySD3LatentImage", width=1024, height=1024)["LATENT"]
        sigmas = workflow.add("BasicScheduler", model=model, scheduler="beta", steps=26)["SIGMAS"]
    sampled = parts.sample_guided(workflow, model, (positive, negative), sigmas, latent, cfg=3.5)
    parts.save_image(workflow, sampled, decoder, "chroma-hd")


TEMPLATES = (Template("chroma1-hd-usp", "Chroma1 HD", "Text to image", Mode.USP, _hd),)
