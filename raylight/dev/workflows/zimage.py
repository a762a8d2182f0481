"""The template of Z-Image."""

from __future__ import annotations

from . import models, notes, parts
from .template import Mode, Template
from .workflow import Workflow

_TEA = (
    "A tea master pours green tea in a wooden pavilion above a misty lake, morning light through paper screens, a "
    'small sign reads "SLOW WATER", photograph, high detail'
)


def _turbo(workflow: Workflow) -> None:
    files = (models.Z_IMAGE_TURBO,)
    parts.note(
        workflow,
        "Z-Image Turbo, text to image in eight steps, on all GPUs",
        "All GPUs sample one image together: each has a part of its tokens.",
        (*files, models.QWEN3, models.Z_IMAGE_VAE),
        notes.usp(files, uses_cfg=False),
    )
    init = parts.workers(workflow)
    with workflow.group("Step 2 - Models", column=True):
        model = parts.as_model(workflow, models.Z_IMAGE_TURBO, init)
        model = workflow.add("ModelSamplingAuraFlow", model=model, shift=3.0)["MODEL"]
        clip = parts.text_encoder(workflow, "lumina2", models.QWEN3)
        decoder = parts.vae(workflow, models.Z_IMAGE_VAE, init)
    with workflow.group("Step 3 - Prompt", column=True):
        positive = parts.prompt(workflow, clip, _TEA)
        negative = parts.no_negative(workflow, positive)
    with workflow.group("Step 4 - Size"):
        latent = workflow.add("EmptySD3LatentImage", width=1024, height=1024)["LATENT"]
    sampled = parts.sample(workflow, model, (positive, negative), latent, steps=8, cfg=1.0, sampler="res_multistep")
    parts.save_image(workflow, sampled, decoder, "z-image-turbo")


TEMPLATES = (Template("z-image-turbo-usp", "Z-Image Turbo", "Text to image", Mode.USP, _turbo),)
