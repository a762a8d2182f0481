"""The template of MiniMax H3."""

from __future__ import annotations

from . import models, notes, parts
from .template import Mode, Template
from .workflow import Workflow

_STORM = (
    "A lighthouse keeper climbs the last steps with a lantern while a storm hits the windows. He sets it down, looks "
    'out to the sea and says: "There they are." Thunder, wind and the creaking of wood; cinematic, practical light, '
    "the camera follows him."
)


def _text_to_video(workflow: Workflow) -> None:
    files = (models.MINIMAX,)
    parts.note(
        workflow,
        "MiniMax H3, text to video with sound, on all GPUs",
        "All GPUs sample one video and its sound together. A first and a last frame can be connected. Both VAEs "
        "decode on ComfyUI's GPU: the one for video cuts the picture into tiles itself, and cannot be split by rows.",
        (*files, models.QWEN3_VL, models.MINIMAX_VIDEO_VAE, models.MINIMAX_AUDIO_VAE),
        notes.usp(files, uses_cfg=False),
    )
    init = parts.workers(workflow)
    with workflow.group("Step 2 - Models", column=True):
        model = parts.as_model(workflow, models.MINIMAX, init)
        clip = parts.text_encoder(workflow, "minimax", models.QWEN3_VL)
        decoder, sound_decoder = (
            workflow.add("VAELoader", title=title, files=[file], vae_name=file.name)["VAE"]
            for title, file in (("Video VAE", models.MINIMAX_VIDEO_VAE), ("Audio VAE", models.MINIMAX_AUDIO_VAE))
        )
    with workflow.group("Step 3 - Prompt and size", column=True):
        video = workflow.add(
            "MiniMaxH3ImageToVideo", clip=clip, vae=decoder, prompt=_STORM, width=864, height=480, length=56
        )
        sigmas = workflow.add("BasicScheduler", model=model, steps=20)["SIGMAS"]
    sampled = parts.sample_guided(
        workflow,
        model,
        (video["positive"], None),
        sigmas,
        video["LATENT"],
        sampler="res_multistep",
        title="Step 4 - Sample on all GPUs",
    )
    with workflow.group("Step 5 - Video with sound", column=True):
        image = workflow.add("VAEDecode", samples=sampled, vae=decoder)["IMAGE"]
        audio = workflow.add("VAEDecodeAudio", samples=sampled, vae=sound_decoder)["AUDIO"]
        parts.video_file(workflow, image, "minimax-h3", 24.0, audio)


TEMPLATES = (Template("minimax-h3-usp", "MiniMax H3", "Text to video with sound", Mode.USP, _text_to_video),)
