"""Templates of Wan 2.1 and 2.2."""

from __future__ import annotations

from typing import Any

from . import models, notes, parts
from .elements import Output
from .models import DiffusionFile
from .template import Mode, Template
from .workflow import Workflow

_FOX = "a fox moving quickly in a beautiful winter scenery, nature, trees, mountains, daytime, tracking camera"
_LIGHTHOUSE = (
    "A lighthouse on a cliff at dusk, waves break on the rocks below and spray rises into the last light, "
    "the beam sweeps slowly over the sea, the camera moves closer, cinematic"
)
_STATION = (
    "Low contrast. In a retro 1970s style subway station a street musician plays the guitar in dim colors and "
    "rough textures, commuters hurry by, the camera moves slowly to the right"
)
_ALIVE = "The scene comes alive: a light wind, small natural movements, the camera moves slowly closer, cinematic light"


def _wan21(file: DiffusionFile, title: str, text: str, degrees: str, name: str, **settings: Any) -> Any:
    def build(workflow: Workflow) -> None:
        parts.note(workflow, title, text, (file, models.UMT5, models.WAN21_VAE), degrees)
        init = parts.workers(workflow, **settings)
        with workflow.group("Step 2 - Models", column=True):
            actors = parts.as_actors(workflow, file, init)
            clip = parts.text_encoder(workflow, "wan", models.UMT5)
            decoder = parts.vae(workflow, models.WAN21_VAE, init)
        positive, negative = parts.prompts(workflow, clip, _FOX)
        with workflow.group("Step 4 - Size"):
            latent = workflow.add("EmptyHunyuanLatentVideo", width=832, height=480, length=81)["LATENT"]
        with workflow.group("Step 5 - Sample on all GPUs", column=True):
            sampled = workflow.add(
                "XFuserKSamplerAdvanced",
                ray_actors=actors,
                positive=positive,
                negative=negative,
                latent_image=latent,
                steps=30,
                cfg=6.0,
                sampler_name="uni_pc",
            )["latent"]
        parts.save_video(workflow, sampled, decoder, name, 16.0)

    return build


def _high_and_low(workflow: Workflow, files: tuple[DiffusionFile, ...], init: Output) -> list[Output]:
    """Add the two models of Wan 2.2, with their shift."""
    loaded = []
    for file, noise in zip(files, ("High noise", "Low noise"), strict=True):
        model = parts.as_model(workflow, file, init, title=f"{noise} model")
        loaded.append(workflow.add("ModelSamplingSD3", title=f"{noise} shift", model=model, shift=5.0)["MODEL"])
    return loaded


def _two_samplers(
    workflow: Workflow, loaded: list[Output], positive: Output, negative: Output, latent: Output
) -> Output:
    """Sample the first half of the steps with the high noise model and the second half with the low noise model."""
    common = {"positive": positive, "negative": negative, "steps": 20, "cfg": 3.5}
    with workflow.group("Step 5 - Sample on all GPUs", column=True):
        half = workflow.add(
            "KSamplerAdvanced",
            title="High noise: steps 0 to 10",
            model=loaded[0],
            latent_image=latent,
            end_at_step=10,
            return_with_leftover_noise="enable",
            **common,
        )["LATENT"]
        return workflow.add(
            "KSamplerAdvanced",
            title="Low noise: steps 10 to 20",
            control="fixed",
            model=loaded[1],
            latent_image=half,
            add_noise="disable",
            start_at_step=10,
            **common,
        )["LATENT"]


def _wan22_t2v(workflow: Workflow) -> None:
    files = models.WAN22_T2V
    parts.note(
        workflow,
        "Wan 2.2 14B, text to video, on all GPUs",
        "All GPUs sample one video together. Both models stay on the workers, so the second run loads nothing. "
        "The loaders give a MODEL like any other: shift, LoRA and sampler are ComfyUI's own nodes.",
        (*files, models.UMT5, models.WAN21_VAE),
        notes.usp(files, uses_cfg=True),
    )
    init = parts.workers(workflow)
    with workflow.group("Step 2 - Models", column=True):
        loaded = _high_and_low(workflow, files, init)
        clip = parts.text_encoder(workflow, "wan", models.UMT5)
        decoder = parts.vae(workflow, models.WAN21_VAE, init)
    positive, negative = parts.prompts(workflow, clip, _LIGHTHOUSE)
    with workflow.group("Step 4 - Size"):
        latent = workflow.add("EmptyHunyuanLatentVideo", width=640, height=640, length=81)["LATENT"]
    parts.save_video(workflow, _two_samplers(workflow, loaded, positive, negative, latent), decoder, "wan2.2-t2v", 16.0)


def _wan22_i2v(workflow: Workflow) -> None:
    files = models.WAN22_I2V
    parts.note(
        workflow,
        "Wan 2.2 14B, image to video, on all GPUs",
        "All GPUs sample one video together that begins with your image. Both models stay on the workers, so "
        "the second run loads nothing.",
        (*files, models.UMT5, models.WAN21_VAE),
        notes.usp(files, uses_cfg=True),
    )
    init = parts.workers(workflow)
    with workflow.group("Step 2 - Models", column=True):
        loaded = _high_and_low(workflow, files, init)
        clip = parts.text_encoder(workflow, "wan", models.UMT5)
        decoder = parts.vae(workflow, models.WAN21_VAE, init)
    positive, negative = parts.prompts(workflow, clip, _ALIVE)
    with workflow.group("Step 4 - Image and size", column=True):
        picture = workflow.add("LoadImage", title="First frame")["IMAGE"]
        video = workflow.add(
            "WanImageToVideo",
            positive=positive,
            negative=negative,
            vae=decoder,
            start_image=picture,
            width=640,
            height=640,
        )
    sampled = _two_samplers(workflow, loaded, video["positive"], video["negative"], video["latent"])
    parts.save_video(workflow, sampled, decoder, "wan2.2-i2v", 16.0)


def _wan22_ti2v(workflow: Workflow) -> None:
    files = (models.WAN22_TI2V,)
    parts.note(
        workflow,
        "Wan 2.2 5B, text and image to video, on all GPUs",
        "All GPUs sample one video together. For text to video, remove the image (or bypass it with Ctrl+B).",
        (*files, models.UMT5, models.WAN22_VAE),
        notes.usp(files, uses_cfg=True),
    )
    init = parts.workers(workflow)
    with workflow.group("Step 2 - Models", column=True):
        model = parts.as_model(workflow, models.WAN22_TI2V, init)
        model = workflow.add("ModelSamplingSD3", model=model, shift=8.0)["MODEL"]
        clip = parts.text_encoder(workflow, "wan", models.UMT5)
        decoder = parts.vae(workflow, models.WAN22_VAE, init)
    prompts = parts.prompts(workflow, clip, _STATION)
    with workflow.group("Step 4 - Image and size", column=True):
        picture = workflow.add("LoadImage", title="First frame")["IMAGE"]
        latent = workflow.add("Wan22ImageToVideoLatent", vae=decoder, start_image=picture, length=121)["LATENT"]
    sampled = parts.sample(workflow, model, prompts, latent, steps=20, cfg=5.0, sampler="uni_pc")
    parts.save_video(workflow, sampled, decoder, "wan2.2-ti2v", 24.0)


def _vace(title: str, text: str, degrees: str, name: str, **settings: Any) -> Any:
    def build(workflow: Workflow) -> None:
        parts.note(workflow, title, text, (models.VACE, models.UMT5, models.WAN21_VAE), degrees)
        init = parts.workers(workflow, **settings)
        with workflow.group("Step 2 - Models", column=True):
            actors = parts.as_actors(workflow, models.VACE, init)
            clip = parts.text_encoder(workflow, "wan", models.UMT5)
            decoder = parts.vae(workflow, models.WAN21_VAE, init)
        positive, negative = parts.prompts(workflow, clip, _ALIVE)
        with workflow.group("Step 4 - Reference and size", column=True):
            picture = workflow.add("LoadImage", title="What should be in the video")["IMAGE"]
            video = workflow.add(
                "WanVaceToVideo", positive=positive, negative=negative, vae=decoder, reference_image=picture
            )
        with workflow.group("Step 5 - Sample on all GPUs", column=True):
            sampled = workflow.add(
                "XFuserKSamplerAdvanced",
                ray_actors=actors,
                positive=video["positive"],
                negative=video["negative"],
                latent_image=video["latent"],
                steps=20,
                cfg=6.0,
                sampler_name="uni_pc",
            )["latent"]
            trimmed = workflow.add("TrimVideoLatent", samples=sampled, trim_amount=video["trim_latent"])["LATENT"]
        parts.save_video(workflow, trimmed, decoder, name, 16.0)

    return build


TEMPLATES = (
    Template(
        "wan2.1-t2v-14b-usp",
        "Wan 2.1 14B",
        "Text to video",
        Mode.USP,
        _wan21(
            models.WAN21_T2V,
            "Wan 2.1 14B, text to video, on all GPUs",
            "All GPUs sample one video together: each has a part of its tokens.",
            notes.usp((models.WAN21_T2V,), uses_cfg=True),
            "wan2.1-t2v",
        ),
    ),
    Template(
        "wan2.1-t2v-14b-fsdp",
        "Wan 2.1 14B",
        "Text to video",
        Mode.FSDP,
        _wan21(
            models.WAN21_T2V_BF16,
            "Wan 2.1 14B in bf16, its weights split over all GPUs",
            "For a model that does not fit on one GPU: FSDP splits its weights, and the result stays the same to the "
            "last bit.",
            notes.fsdp((models.WAN21_T2V_BF16,)),
            "wan2.1-t2v-fsdp",
            FSDP=True,
        ),
    ),
    Template("wan2.2-t2v-14b-usp", "Wan 2.2 14B", "Text to video", Mode.USP, _wan22_t2v),
    Template("wan2.2-i2v-14b-usp", "Wan 2.2 14B", "Image to video", Mode.USP, _wan22_i2v),
    Template("wan2.2-ti2v-5b-usp", "Wan 2.2 5B", "Text and image to video", Mode.USP, _wan22_ti2v),
    Template(
        "wan2.1-vace-14b-usp",
        "Wan VACE 14B",
        "Reference to video",
        Mode.USP,
        _vace(
            "Wan VACE 14B, reference to video, on all GPUs",
            "All GPUs sample one video together with what your picture shows. A control video and masks can be "
            "connected to WanVaceToVideo as well.",
            notes.usp((models.VACE,), uses_cfg=True),
            "wan2.1-vace",
        ),
    ),
    Template(
        "wan2.1-vace-14b-fsdp-offload",
        "Wan VACE 14B",
        "Reference to video",
        Mode.OFFLOAD,
        _vace(
            "Wan VACE 14B in fp16 on small GPUs",
            "For GPUs that do not even hold their part of the weights: these stay in system memory, and all GPUs share "
            "the tokens.",
            notes.offload((models.VACE,)),
            "wan2.1-vace-offload",
            FSDP=True,
            FSDP_CPU_OFFLOAD=True,
        ),
    ),
)
