"""Groups of nodes that several templates share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import layout, notes
from .elements import Output
from .models import DiffusionFile, ModelFile
from .workflow import Workflow

BAD_VIDEO = (
    "overexposed, static, blurred details, subtitles, painting, still picture, worst quality, low quality, "
    "jpeg artifacts, ugly, deformed, extra fingers, poorly drawn hands, poorly drawn faces, cluttered "
    "background, walking backwards"
)


def note(workflow: Workflow, title: str, text: str, files: Sequence[ModelFile], degrees: str) -> None:
    with workflow.group("Read me", color=layout.GREEN, column=True):
        workflow.add(
            "MarkdownNote", title="Degrees, memory, model files", text=notes.about(title, text, files, degrees)
        )


def workers(workflow: Workflow, **settings: Any) -> Output:
    with workflow.group("Step 1 - GPUs", column=True):
        return workflow.add("RayInitializer", **settings)["ray_actors_init"]


def as_model(
    workflow: Workflow, file: DiffusionFile, init: Output | None, lora: Output | None = None, title: str | None = None
) -> Output:
    """Add loaders whose output is a MODEL for all of ComfyUI's nodes."""
    return workflow.add(
        "RayModelLoader", title=title, files=[file], unet_name=file.name, ray_actors_init=init, lora=lora
    )["model"]


def as_actors(workflow: Workflow, file: DiffusionFile, init: Output) -> Output:
    """Add loaders whose output is a model for the Ray samplers."""
    return workflow.add("RayUNETLoader", files=[file], unet_name=file.name, ray_actors_init=init)["ray_actors"]


def text_encoder(workflow: Workflow, kind: str, *files: ModelFile) -> Output:
    if len(files) == 1:
        return workflow.add("CLIPLoader", files=files, clip_name=files[0].name, type=kind)["CLIP"]
    return workflow.add("DualCLIPLoader", files=files, clip_name1=files[0].name, clip_name2=files[1].name, type=kind)[
        "CLIP"
    ]


def vae(workflow: Workflow, file: ModelFile, init: Output | None) -> Output:
    """Add a VAE on the workers of `init`, or without it on one worker for each GPU."""
    return workflow.add("RayVAELoaderAsVAE", files=[file], vae_name=file.name, ray_actors_init=init)["vae"]


def prompt(workflow: Workflow, clip: Output, text: str, title: str = "Positive prompt") -> Output:
    return workflow.add("CLIPTextEncode", title=title, clip=clip, text=text)["CONDITIONING"]


def prompts(workflow: Workflow, clip: Output, positive: str, negative: str = BAD_VIDEO) -> tuple[Output, Output]:
    with workflow.group("Step 3 - Prompts", column=True):
        return prompt(workflow, clip, positive), prompt(workflow, clip, negative, "Negative prompt")


def no_negative(workflow: Workflow, positive: Output) -> Output:
    return workflow.add("ConditioningZeroOut", conditioning=positive)["CONDITIONING"]


def save_image(workflow: Workflow, latent: Output, decoder: Output, prefix: str) -> None:
    with workflow.group("Step 6 - Image", column=True):
        image = workflow.add("VAEDecode", samples=latent, vae=decoder)["IMAGE"]
        workflow.add("SaveImage", images=image, filename_prefix=f"raylight/{prefix}")


def sample(
    workflow: Workflow,
    model: Output,
    prompts: tuple[Output, Output],
    latent: Output,
    *,
    steps: int,
    cfg: float,
    sampler: str = "euler",
    title: str = "Step 5 - Sample on all GPUs",
) -> Output:
    """Add ComfyUI's KSampler for the positive and the negative prompt."""
    positive, negative = prompts
    with workflow.group(title, column=True):
        return workflow.add(
            "KSampler",
            model=model,
            positive=positive,
            negative=negative,
            latent_image=latent,
            steps=steps,
            cfg=cfg,
            sampler_name=sampler,
        )["LATENT"]


def sample_guided(
    workflow: Workflow,
    model: Output,
    prompts: tuple[Output, Output | None],
    sigmas: Output,
    latent: Output,
    *,
    cfg: float = 1.0,
    sampler: str = "euler",
    title: str = "Step 5 - Sample on all GPUs",
) -> Output:
    """Add a guider of the positive prompt, or of the positive and the negative one, and a sampler."""
    positive, negative = prompts
    with workflow.group(title, column=True):
        noise = workflow.add("RandomNoise")["NOISE"]
        if negative is None:
            guider = workflow.add("BasicGuider", model=model, conditioning=positive)["GUIDER"]
        else:
            guider = workflow.add("CFGGuider", model=model, positive=positive, negative=negative, cfg=cfg)["GUIDER"]
        algorithm = workflow.add("KSamplerSelect", sampler_name=sampler)["SAMPLER"]
        return workflow.add(
            "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=algorithm, sigmas=sigmas, latent_image=latent
        )["output"]


def save_video(workflow: Workflow, latent: Output, decoder: Output, prefix: str, fps: float, step: int = 6) -> None:
    with workflow.group(f"Step {step} - Video", column=True):
        image = workflow.add("VAEDecode", samples=latent, vae=decoder)["IMAGE"]
        video_file(workflow, image, prefix, fps)


def video_file(workflow: Workflow, image: Output, prefix: str, fps: float, audio: Output | None = None) -> None:
    video = workflow.add("CreateVideo", images=image, fps=fps, audio=audio)["VIDEO"]
    workflow.add("SaveVideo", video=video, filename_prefix=f"video/raylight/{prefix}")
