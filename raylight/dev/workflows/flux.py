"""Templates of Flux.1."""

from __future__ import annotations

from . import models, notes, parts
from .elements import Output
from .models import DiffusionFile
from .template import Mode, Template
from .workflow import Workflow

_TEXT = (models.CLIP_L, models.T5)
_GLASSHOUSE = (
    "A glasshouse in a botanical garden early in the morning, mist between the palms, a red bicycle leans "
    "at the iron door, light falls through old panes, photograph, high detail"
)
_SEASONS = (
    "spring, cherry trees in blossom along a quiet canal, soft light, photograph",
    "summer, a field of sunflowers below a wide blue sky, photograph",
    "autumn, a narrow street with golden leaves after the rain, photograph",
    "winter, a wooden cabin in deep snow at night, warm light in its window, photograph",
)
_SKETCH = "Turn this picture into a watercolor painting with soft colors, and keep the composition"
_LINES = "A paper sculpture in soft studio light, white and pale blue, delicate folds, photograph"


def _loaded(
    workflow: Workflow, file: DiffusionFile, init: Output, text: tuple[models.ModelFile, ...] = _TEXT
) -> tuple[Output, Output, Output]:
    with workflow.group("Step 2 - Models", column=True):
        return (
            parts.as_actors(workflow, file, init),
            parts.text_encoder(workflow, "flux", *text),
            parts.vae(workflow, models.FLUX_VAE, init),
        )


def _size(workflow: Workflow) -> Output:
    with workflow.group("Step 4 - Size"):
        return workflow.add("EmptySD3LatentImage", width=1024, height=1024)["LATENT"]


def _sample(workflow: Workflow, actors: Output, positive: Output, negative: Output, latent: Output) -> Output:
    with workflow.group("Step 5 - Sample on all GPUs", column=True):
        return workflow.add(
            "XFuserKSamplerAdvanced",
            ray_actors=actors,
            positive=positive,
            negative=negative,
            latent_image=latent,
            steps=20,
            cfg=1.0,
        )["latent"]


def _dev(workflow: Workflow) -> None:
    files = (models.FLUX_DEV,)
    parts.note(
        workflow,
        "Flux.1 dev, text to image, on all GPUs",
        "All GPUs sample one image together: each has a part of its tokens.",
        (*files, *_TEXT, models.FLUX_VAE),
        notes.usp(files, uses_cfg=False),
    )
    actors, clip, decoder = _loaded(workflow, models.FLUX_DEV, parts.workers(workflow))
    with workflow.group("Step 3 - Prompt", column=True):
        positive = parts.prompt(workflow, clip, _GLASSHOUSE)
        negative = parts.no_negative(workflow, positive)
    latent = _size(workflow)
    parts.save_image(workflow, _sample(workflow, actors, positive, negative, latent), decoder, "flux-dev")


def _drop_in(workflow: Workflow) -> None:
    files = (models.FLUX_DEV,)
    parts.note(
        workflow,
        "Flux.1 dev: only the loaders are others",
        "Any workflow becomes parallel this way: Load Diffusion Model as MODEL (Ray) takes the place of Load "
        "Diffusion Model, Load VAE (Ray) that of Load VAE, and all other nodes stay as they are.",
        (*files, *_TEXT, models.FLUX_VAE),
        notes.drop_in(files),
    )
    with workflow.group("Step 1 - Models", column=True):
        model = parts.as_model(workflow, models.FLUX_DEV, None)
        clip = parts.text_encoder(workflow, "flux", *_TEXT)
        decoder = parts.vae(workflow, models.FLUX_VAE, None)
    with workflow.group("Step 2 - Prompt", column=True):
        positive = parts.prompt(workflow, clip, _GLASSHOUSE)
        negative = parts.no_negative(workflow, positive)
    with workflow.group("Step 3 - Size"):
        latent = workflow.add("EmptySD3LatentImage", width=1024, height=1024)["LATENT"]
    sampled = parts.sample(
        workflow, model, (positive, negative), latent, steps=20, cfg=1.0, title="Step 4 - ComfyUI's own sampler"
    )
    with workflow.group("Step 5 - Image", column=True):
        image = workflow.add("VAEDecode", samples=sampled, vae=decoder)["IMAGE"]
        workflow.add("SaveImage", images=image, filename_prefix="raylight/flux-dropin")


def _data_parallel(workflow: Workflow) -> None:
    files = (models.FLUX_DEV,)
    parts.note(
        workflow,
        "Flux.1 dev: a list of prompts, an image on each GPU",
        "Each GPU makes whole images by itself, so GPUs exchange nothing during a step.",
        (*files, *_TEXT, models.FLUX_VAE),
        notes.data_parallel(files, len(_SEASONS)),
    )
    init = parts.workers(workflow, ulysses_degree=1, dp_degree=0)
    actors, clip, decoder = _loaded(workflow, models.FLUX_DEV, init)
    with workflow.group("Step 3 - Prompts, one for each image", column=True):
        each = [parts.prompt(workflow, clip, text, f"Prompt {n}") for n, text in enumerate(_SEASONS, 1)]
    with workflow.group("Lists", column=True):
        positive = workflow.add(
            "DPConditioningList", **{f"conditioning_{n}": prompt for n, prompt in enumerate(each, 1)}
        )
        negative = parts.no_negative(workflow, each[0])
        noises = [
            workflow.add("RandomNoise", title=f"Noise {n}", control="fixed", noise_seed=n)["NOISE"]
            for n in range(1, len(_SEASONS) + 1)
        ]
        noise = workflow.add("DPNoiseList", **{f"noise_{n}": noise for n, noise in enumerate(noises, 1)})
    with workflow.group("Step 4 - Size", column=True):
        latent = workflow.add("EmptySD3LatentImage", width=1024, height=1024)["LATENT"]
    with workflow.group("Step 5 - Sample, an image on each GPU"):
        sampled = workflow.add(
            "DPKSamplerAdvanced",
            ray_actors=actors,
            noise_list=noise["noise_list"],
            positive=positive["conditioning_list"],
            negative=negative,
            latent_image=latent,
            steps=20,
            cfg=1.0,
        )["latent"]
    parts.save_image(workflow, sampled, decoder, "flux-prompts")


def _kontext(workflow: Workflow) -> None:
    files, text = (models.FLUX_KONTEXT,), (models.CLIP_L, models.T5_FP8)
    parts.note(
        workflow,
        "Flux.1 Kontext dev, image editing, on all GPUs",
        "All GPUs edit one image together: tokens of the new image and of yours are shared among them.",
        (*files, *text, models.FLUX_VAE),
        notes.usp(files, uses_cfg=False),
    )
    actors, clip, decoder = _loaded(workflow, models.FLUX_KONTEXT, parts.workers(workflow), text)
    with workflow.group("Step 3 - Image", column=True):
        picture = workflow.add("LoadImage", title="Image to edit")["IMAGE"]
        scaled = workflow.add("FluxKontextImageScale", image=picture)["IMAGE"]
        latent = workflow.add("VAEEncode", pixels=scaled, vae=decoder)["LATENT"]
    with workflow.group("Step 4 - What to change", column=True):
        positive = parts.prompt(workflow, clip, _SKETCH)
        negative = parts.no_negative(workflow, positive)
        positive = workflow.add("ReferenceLatent", conditioning=positive, latent=latent)["CONDITIONING"]
        positive = workflow.add("FluxGuidance", conditioning=positive, guidance=2.5)["CONDITIONING"]
    parts.save_image(workflow, _sample(workflow, actors, positive, negative, latent), decoder, "flux-kontext")


def _controlnet(workflow: Workflow) -> None:
    files = (models.FLUX_DEV,)
    parts.note(
        workflow,
        "Flux.1 dev with a ControlNet, on all GPUs",
        "All GPUs sample one image together. The ControlNet runs once a step in ComfyUI's own process, on its "
        "GPU, and what it says goes to the workers, each its part.",
        (*files, *_TEXT, models.FLUX_VAE, models.FLUX_CANNY),
        notes.usp(files, uses_cfg=False),
    )
    actors, clip, decoder = _loaded(workflow, models.FLUX_DEV, parts.workers(workflow))
    with workflow.group("Step 3 - Control image", column=True):
        control = workflow.add("ControlNetLoader", files=[models.FLUX_CANNY], control_net_name=models.FLUX_CANNY.name)[
            "CONTROL_NET"
        ]
        picture = workflow.add("LoadImage", title="Image with the outlines")["IMAGE"]
        lines = workflow.add("Canny", image=picture, low_threshold=0.15, high_threshold=0.3)["IMAGE"]
    with workflow.group("Step 4 - Prompt and size", column=True):
        positive = parts.prompt(workflow, clip, _LINES)
        negative = parts.no_negative(workflow, positive)
        controlled = workflow.add(
            "ControlNetApplyAdvanced",
            positive=positive,
            negative=negative,
            control_net=control,
            image=lines,
            vae=decoder,
            strength=0.7,
            end_percent=0.8,
        )
        latent = workflow.add("EmptySD3LatentImage", width=1024, height=1024)["LATENT"]
    sampled = _sample(workflow, actors, controlled["positive"], controlled["negative"], latent)
    parts.save_image(workflow, sampled, decoder, "flux-controlnet")


TEMPLATES = (
    Template("flux-dev-usp", "Flux.1 dev", "Text to image", Mode.USP, _dev),
    Template("flux-dev-dropin", "Flux.1 dev", "Text to image", Mode.DROP_IN, _drop_in),
    Template("flux-dev-dp", "Flux.1 dev", "A list of prompts", Mode.DATA, _data_parallel),
    Template("flux-kontext-usp", "Flux.1 Kontext", "Image editing", Mode.USP, _kontext),
    Template("flux-controlnet-usp", "Flux.1 dev", "ControlNet", Mode.USP, _controlnet),
)
