"""Templates of Qwen-Image."""

from __future__ import annotations

from typing import Any

from . import models, notes, parts
from .elements import Output
from .models import DiffusionFile
from .template import Mode, Template
from .workflow import Workflow

_SHOP = (
    "A small bookshop at a street corner on a rainy evening, warm light in the windows, a hand-painted sign reads "
    '"SEVERAL HANDS BOOKS", reflections on the pavement, cinematic, high detail'
)
_SIGN = "Make it evening: warm light from lamps, long shadows, a deep blue sky. Keep everything else as it is."
_RELIGHT = "重新照明, relight the image with twilight: warm color temperature, soft light, blurred shadows"


def _text_to_image(title: str, text: str, degrees: str, name: str, **settings: Any) -> Any:
    def build(workflow: Workflow) -> None:
        parts.note(workflow, title, text, (models.QWEN, models.QWEN_VL, models.QWEN_VAE), degrees)
        init = parts.workers(workflow, **settings)
        with workflow.group("Step 2 - Models", column=True):
            model = parts.as_model(workflow, models.QWEN, init)
            model = workflow.add("ModelSamplingAuraFlow", model=model, shift=3.1)["MODEL"]
            clip = parts.text_encoder(workflow, "qwen_image", models.QWEN_VL)
            decoder = parts.vae(workflow, models.QWEN_VAE, init)
        prompts = parts.prompts(workflow, clip, _SHOP, "")
        with workflow.group("Step 4 - Size"):
            latent = workflow.add("EmptySD3LatentImage", width=1328, height=1328)["LATENT"]
        sampled = parts.sample(workflow, model, prompts, latent, steps=20, cfg=4.0)
        parts.save_image(workflow, sampled, decoder, name)

    return build


def _edited(
    workflow: Workflow,
    file: DiffusionFile,
    init: Output,
    lora: Output | None,
    text: str,
    name: str,
    steps: int,
    cfg: float,
) -> None:
    newest = file is models.QWEN_EDIT
    with workflow.group("Step 2 - Models", column=True):
        model = parts.as_model(workflow, file, init, lora)
        model = workflow.add("ModelSamplingAuraFlow", model=model, shift=3.1 if newest else 3.0)["MODEL"]
        model = workflow.add("CFGNorm", model=model)["patched_model"]
        clip = parts.text_encoder(workflow, "qwen_image", models.QWEN_VL)
        decoder = parts.vae(workflow, models.QWEN_VAE, init)
    with workflow.group("Step 3 - Image", column=True):
        picture = workflow.add("LoadImage", title="Image to edit")["IMAGE"]
        scaled = workflow.add("FluxKontextImageScale", image=picture)["IMAGE"]
        latent = workflow.add("VAEEncode", pixels=scaled, vae=decoder)["LATENT"]
    with workflow.group("Step 4 - What to change", column=True):
        of_image = {"clip": clip, "vae": decoder, "image1": scaled}
        positive, negative = (
            workflow.add("TextEncodeQwenImageEditPlus", title=title, prompt=prompt, **of_image)["CONDITIONING"]
            for title, prompt in (("Positive prompt", text), ("Negative prompt", ""))
        )
        if newest:  # it tells the image to edit from the new one by its timestep
            positive, negative = (
                workflow.add(
                    "FluxKontextMultiReferenceLatentMethod",
                    conditioning=prompt,
                    reference_latents_method="index_timestep_zero",
                )["CONDITIONING"]
                for prompt in (positive, negative)
            )
    sampled = parts.sample(workflow, model, (positive, negative), latent, steps=steps, cfg=cfg)
    parts.save_image(workflow, sampled, decoder, name)


def _edit(workflow: Workflow) -> None:
    files = (models.QWEN_EDIT,)
    parts.note(
        workflow,
        "Qwen-Image-Edit 2511, on all GPUs",
        "All GPUs edit one image together: tokens of the new image and of yours are shared among them.",
        (*files, models.QWEN_VL, models.QWEN_VAE),
        notes.usp(files, uses_cfg=True),
    )
    _edited(workflow, models.QWEN_EDIT, parts.workers(workflow), None, _SIGN, "qwen-edit", 40, 4.0)


def _loras(workflow: Workflow) -> None:
    files, loras = (models.QWEN_EDIT_2509,), (models.QWEN_RELIGHT, models.QWEN_LIGHTNING)
    parts.note(
        workflow,
        "Qwen-Image-Edit with two LoRAs, on all GPUs",
        "LoRAs are chained and go into the loader; the workers put them on the model. Another strength, or "
        "another LoRA, does not load the model again. One LoRA relights the image, the other makes four steps "
        "enough (`cfg` is 1 for it). ComfyUI's own LoRA loaders, behind the model, do the same.",
        (*files, models.QWEN_VL, models.QWEN_VAE, *loras),
        notes.usp(files, uses_cfg=False),
    )
    init = parts.workers(workflow)
    with workflow.group("LoRAs", column=True):
        chain = None
        for file in loras:
            chain = workflow.add("RayLoraLoader", files=[file], lora_name=file.name, prev_ray_lora=chain)["ray_lora"]
    _edited(workflow, models.QWEN_EDIT_2509, init, chain, _RELIGHT, "qwen-edit-loras", 4, 1.0)


TEMPLATES = (
    Template(
        "qwen-image-usp",
        "Qwen-Image",
        "Text to image",
        Mode.USP,
        _text_to_image(
            "Qwen-Image, text to image, on all GPUs",
            "All GPUs sample one image together: each has a part of its tokens.",
            notes.usp((models.QWEN,), uses_cfg=True),
            "qwen-image",
        ),
    ),
    Template(
        "qwen-image-cfg",
        "Qwen-Image",
        "Text to image",
        Mode.CFG,
        _text_to_image(
            "Qwen-Image: positive and negative prompt on different GPUs",
            "One half of the GPUs computes the positive prompt, the other half the negative one.",
            notes.cfg((models.QWEN,)),
            "qwen-image-cfg",
            cfg_degree=2,
        ),
    ),
    Template("qwen-edit-usp", "Qwen-Image-Edit", "Image editing", Mode.USP, _edit),
    Template("qwen-edit-loras", "Qwen-Image-Edit", "Relight in four steps", Mode.LORAS, _loras),
)
