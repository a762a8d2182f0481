"""Models, conditioning and latents for comparisons with ComfyUI in one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.sample
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from raylight.dev.demo.prompts import random_prompt
from raylight.dev.demo.tiny import write_checkpoint
from raylight.driver import api
from raylight.host.recipe import OFFLOADED, REPLICATED, SHARDED, RayModel


@dataclass(frozen=True)
class ParityCase:
    """One sampling run. `shape` is the latent's; `extras` names what the conditioning carries besides text; `tokens`
    are those of the positive and of the negative prompt.
    """

    family: str
    shape: tuple[int, ...]
    text_width: int
    pooled: int = 0
    extras: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    sampler: str = "euler"
    cfg: float = 3.0
    masked: bool = False
    heads: int = 3
    regions: bool = False
    strategy: str = "raylight"
    sharding: str = REPLICATED
    tokens: tuple[int, int] = (11, 7)

    def conditioning(self) -> tuple[list[Any], list[Any]]:
        """Positive and negative, of different lengths."""
        both = []
        for seed, tokens in enumerate(self.tokens, start=1):
            prompt = random_prompt(tokens, self.text_width, seed, self.pooled, **self.options)
            for extra in self.extras:
                prompt[0][1].update(EXTRAS[extra](self, torch.Generator().manual_seed(seed + 10)))
            both.append(prompt)
        if self.regions:
            both[0] += self._regions()
        return both[0], both[1]

    def _regions(self) -> list[Any]:
        """Two more prompts, of other lengths, for parts of the picture: by a mask, and by an area and its strength."""
        by_mask = random_prompt(9, self.text_width, 3, self.pooled, **self.options)
        mask = torch.zeros(1, *self.shape[-2:])
        mask[..., : self.shape[-1] // 2] = 1
        by_mask[0][1].update(mask=mask, mask_strength=0.8, set_area_to_bounds=False)
        by_area = random_prompt(5, self.text_width, 4, self.pooled, **self.options)
        by_area[0][1].update(area=(8, 10, 4, 2), strength=0.6, set_area_to_bounds=False)
        return by_mask + by_area

    def latent(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(5)
        if not self.masked:
            return {"samples": torch.zeros(self.shape)}
        mask = torch.zeros(1, 1, *self.shape[-2:])
        mask[..., : self.shape[-1] // 2] = 1
        return {"samples": torch.randn(self.shape, generator=generator), "noise_mask": mask}


def _image_to_video(case: ParityCase, generator: torch.Generator) -> dict[str, Any]:
    image = torch.randn(1, *case.shape[1:], generator=generator)
    mask = torch.ones(1, 1, *case.shape[2:])
    mask[:, :, 0] = 0
    output = comfy.clip_vision.Output()
    output["penultimate_hidden_states"] = torch.randn(1, 257, 1280, generator=generator)
    return {"concat_latent_image": image, "concat_mask": mask, "clip_vision_output": output}


def _references(case: ParityCase, generator: torch.Generator) -> dict[str, Any]:
    return {
        "reference_latents": [
            torch.randn(1, 16, 10, 6, generator=generator),
            torch.randn(1, 16, 7, 9, generator=generator),
        ]
    }


EXTRAS = {"image-to-video": _image_to_video, "references": _references}

CASES = {
    "Wan T2V": ParityCase("wan-t2v", (1, 16, 3, 14, 18), 4096),
    "Wan T2V, batch of 2, odd size": ParityCase("wan-t2v", (2, 16, 2, 13, 11), 4096, sampler="dpmpp_2m"),
    "Wan T2V, ancestral, masked": ParityCase(
        "wan-t2v", (1, 16, 3, 10, 14), 4096, sampler="euler_ancestral", masked=True
    ),
    "Wan T2V by yunchang": ParityCase("wan-t2v", (1, 16, 3, 14, 18), 4096, heads=6, strategy="yunchang"),
    "Wan T2V, FSDP": ParityCase("wan-t2v", (1, 16, 3, 14, 18), 4096, sharding=SHARDED),
    "Flux, FSDP, offloaded, batch of 2": ParityCase("flux-schnell", (2, 16, 17, 13), 160, 96, sharding=OFFLOADED),
    "Wan I2V": ParityCase("wan-i2v", (1, 16, 3, 14, 18), 4096, extras=("image-to-video",)),
    "Flux": ParityCase("flux-schnell", (1, 16, 18, 22), 160, 96, cfg=1.0),
    "Flux, batch of 2, odd size": ParityCase("flux-schnell", (2, 16, 17, 13), 160, 96, sampler="heun"),
    "Flux, regional prompts": ParityCase("flux-schnell", (1, 16, 18, 22), 160, 96, regions=True),
    "Flux, negative prompt of one token": ParityCase("flux-schnell", (1, 16, 18, 22), 160, 96, tokens=(11, 1)),
    "Flux, negative prompt of one token, FSDP": ParityCase(
        "flux-schnell", (1, 16, 18, 22), 160, 96, sharding=SHARDED, tokens=(2, 1)
    ),
    "Flux, picture and prompts of one token": ParityCase("flux-schnell", (1, 16, 2, 2), 160, 96, tokens=(1, 1)),
    "Flux with guidance": ParityCase("flux-dev", (1, 16, 18, 22), 160, 96, options={"guidance": 4.0}, heads=4),
    "Flux Kontext references": ParityCase("flux-dev", (1, 16, 12, 14), 160, 96, ("references",), {"guidance": 2.5}),
}


def checkpoint(folder: Path, case: ParityCase, seed: int = 0) -> Path:
    """The case's model file, written once."""
    path = folder / f"{case.family}-{case.heads}-{seed}.safetensors"
    if not path.exists():
        write_checkpoint(path, case.family, heads=case.heads, seed=seed)
    return path


@torch.inference_mode()
def sample_stock(
    path: Path, case: ParityCase, steps: int = 4, seed: int = 42, loras: Sequence[tuple[Path, float]] = ()
) -> Tensor:
    """ComfyUI's own loader and sampler, in this process, on nothing of ours; with LoRA files and their strengths."""
    patcher = comfy.sd.load_diffusion_model(str(path))
    for lora, strength in loras:
        patcher, _ = comfy.sd.load_lora_for_models(patcher, None, comfy.utils.load_torch_file(str(lora)), strength, 0)
    return sample(patcher, case, steps, seed)


@torch.inference_mode()
def sample(patcher: ModelPatcher, case: ParityCase, steps: int = 4, seed: int = 42) -> Tensor:
    """A case, as ComfyUI's KSampler samples any MODEL."""
    positive, negative = case.conditioning()
    latent = case.latent()
    samples = comfy.sample.fix_empty_latent_channels(patcher, latent["samples"])
    noise = comfy.sample.prepare_noise(samples, seed)
    return comfy.sample.sample(
        patcher,
        noise,
        steps,
        case.cfg,
        case.sampler,
        "simple",
        positive,
        negative,
        samples,
        noise_mask=latent.get("noise_mask"),
        disable_pbar=True,
        seed=seed,
    )


def sample_on_workers(model: RayModel, case: ParityCase, steps: int = 4, seed: int = 42) -> Tensor:
    """The same on workers."""
    return sample(api.load(model), case, steps, seed)
