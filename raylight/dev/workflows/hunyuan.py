"""The template of Hunyuan Video."""

from __future__ import annotations

from . import models, notes, parts
from .template import Mode, Template
from .workflow import Workflow

_MARKET = (
    "A night market in the rain, lanterns glow above the stalls, steam rises from the pans, people with "
    "umbrellas pass by, the camera moves slowly forward, realistic"
)


def _text_to_video(workflow: Workflow) -> None:
    files = (models.HUNYUAN,)
    parts.note(
        workflow,
        "Hunyuan Video, text to video, on all GPUs",
        "All GPUs sample one video together. The loader gives a MODEL like any other, so guider, scheduler and "
        "sampler are ComfyUI's own nodes.",
        (*files, models.CLIP_L, models.LLAVA, models.HUNYUAN_VAE),
        notes.usp(files, uses_cfg=False),
    )
    init = parts.workers(workflow)
    with workflow.group("Step 2 - Models", column=True):
        model = parts.as_model(workflow, models.HUNYUAN, init)
        shifted = workflow.add("ModelSamplingSD3", model=model, shift=7.0)["MODEL"]
        clip = parts.text_encoder(workflow, "hunyuan_video", models.CLIP_L, models.LLAVA)
        decoder = parts.vae(workflow, models.HUNYUAN_VAE, init)
    with workflow.group("Step 3 - Prompt", column=True):
        positive = parts.prompt(workflow, clip, _MARKET)
        positive = workflow.add("FluxGuidance", conditioning=positive, guidance=6.0)["CONDITIONING"]
    with workflow.group("Step 4 - Size and steps"):
        latent = workflow.add("EmptyHunyuanLatentVideo", width=848, height=480, length=73)["LATENT"]
        sigmas = workflow.add("BasicScheduler", model=model, steps=20)["SIGMAS"]
    sampled = parts.sample_guided(workflow, shifted, (positive, None), sigmas, latent)
    parts.save_video(workflow, sampled, decoder, "hunyuan-video", 24.0)


TEMPLATES = (Template("hunyuan-video-usp", "Hunyuan Video", "Text to video", Mode.USP, _text_to_video),)
