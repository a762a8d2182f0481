"""The template of Wan 2.2 Animate."""

from __future__ import annotations

from . import models, notes, parts
from .elements import Output
from .template import Mode, Template
from .workflow import Workflow

_DANCE = "The character is dancing in the room"


def _video(workflow: Workflow, title: str) -> Output:
    """Add a video that is off at first, because ComfyUI brings none."""
    video = workflow.add("LoadVideo", title=title, bypassed=True)["VIDEO"]
    return workflow.add("GetVideoComponents", title=f"{title}: frames", video=video, bypassed=True)["images"]


def _animate(workflow: Workflow) -> None:
    files = (models.ANIMATE,)
    parts.note(
        workflow,
        "Wan 2.2 Animate 14B, a character that moves as you say, on all GPUs",
        "All GPUs sample one video together. The character is in the image. Its motion comes from a video of drawn "
        "poses, and its face from a video of a face, both made by a preprocessor. Choose them in the two Load Video "
        "nodes and switch these and the nodes behind them on (select them, Ctrl+B); without them the prompt alone says "
        "what happens. One LoRA makes six steps enough (`cfg` is 1 for it).",
        (*files, models.UMT5, models.WAN21_VAE, models.CLIP_VISION, models.WAN_STEPS),
        notes.usp(files, uses_cfg=False),
    )
    init = parts.workers(workflow)
    with workflow.group("Step 2 - Models", column=True):
        model = parts.as_model(workflow, models.ANIMATE, init)
        model = workflow.add(
            "LoraLoaderModelOnly", files=[models.WAN_STEPS], model=model, lora_name=models.WAN_STEPS.name
        )["MODEL"]
        model = workflow.add("ModelSamplingSD3", model=model, shift=8.0)["MODEL"]
        clip = parts.text_encoder(workflow, "wan", models.UMT5)
        decoder = parts.vae(workflow, models.WAN21_VAE, init)
        vision = workflow.add("CLIPVisionLoader", files=[models.CLIP_VISION], clip_name=models.CLIP_VISION.name)[
            "CLIP_VISION"
        ]
    positive, negative = parts.prompts(workflow, clip, _DANCE)
    with workflow.group("Step 4 - Character", column=True):
        picture = workflow.add("LoadImage", title="Character")["IMAGE"]
        seen = workflow.add("CLIPVisionEncode", clip_vision=vision, image=picture, crop="none")["CLIP_VISION_OUTPUT"]
    with workflow.group("Step 5 - Poses and face (off)", column=True):
        poses, face = _video(workflow, "Poses"), _video(workflow, "Face")
    with workflow.group("Step 6 - Size", column=True):
        video = workflow.add(
            "WanAnimateToVideo",
            positive=positive,
            negative=negative,
            vae=decoder,
            clip_vision_output=seen,
            reference_image=picture,
            face_video=face,
            pose_video=poses,
            width=640,
            height=640,
            length=77,
        )
    with workflow.group("Step 7 - Sample on all GPUs", column=True):
        sampled = workflow.add(
            "KSampler",
            model=model,
            positive=video["positive"],
            negative=video["negative"],
            latent_image=video["latent"],
            steps=6,
            cfg=1.0,
        )["LATENT"]
        trimmed = workflow.add("TrimVideoLatent", samples=sampled, trim_amount=video["trim_latent"])["LATENT"]
    parts.save_video(workflow, trimmed, decoder, "wan2.2-animate", 16.0, step=8)


TEMPLATES = (Template("wan2.2-animate-14b-usp", "Wan 2.2 Animate", "Character to video", Mode.USP, _animate),)
