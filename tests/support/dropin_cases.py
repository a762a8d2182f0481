"""Set-ups of samplers, guiders and patches, made by ComfyUI's own nodes on any MODEL."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.controlnet
import comfy.ops
import comfy.sample
import comfy.samplers
import torch
from comfy.ldm.flux.controlnet import ControlNetFlux
from comfy.model_patcher import ModelPatcher
from comfy_extras import (
    nodes_cfg,
    nodes_custom_sampler,
    nodes_easycache,
    nodes_model_advanced,
    nodes_perpneg,
    nodes_slg,
)
from torch import Tensor

from raylight.dev.demo.prompts import random_prompt

SHAPE = (1, 16, 13, 14)
EVEN = (1, 16, 12, 14)  # ComfyUI's ControlNet of Flux takes no other
STEPS = 4
SAMPLERS = ("euler", "heun", "dpmpp_2m", "euler_ancestral", "dpmpp_2m_sde", "uni_pc")


class OnlyHere:
    """Of a module that workers do not have, though its name is a plain one."""


SetUp = Callable[[ModelPatcher], Any]


def prompt(seed: int, tokens: int = 24) -> list[Any]:
    return random_prompt(tokens, 160, seed, 96)


def plain(model: ModelPatcher) -> Any:
    return _cfg(model, 3.0)


def equal_lengths(model: ModelPatcher) -> Any:
    return nodes_custom_sampler.CFGGuider.execute(model, prompt(1), prompt(2), 3.0).result[0]


def basic_shifted(model: ModelPatcher) -> Any:
    (model,) = nodes_model_advanced.ModelSamplingFlux().patch(model, 1.15, 0.5, 256, 256)
    return nodes_custom_sampler.BasicGuider.execute(model, prompt(1)).result[0]


def zero_star_rescaled(model: ModelPatcher) -> Any:
    model = nodes_cfg.CFGZeroStar.execute(model).result[0]
    (model,) = nodes_model_advanced.RescaleCFG().patch(model, 0.7)
    return _cfg(model, 3.0)


def dual_cfg(model: ModelPatcher) -> Any:
    execute = nodes_custom_sampler.DualCFGGuider.execute
    return execute(model, prompt(1), prompt(2), prompt(3), 3.0, 2.0, "regular").result[0]


def dual_model(model: ModelPatcher, negative: ModelPatcher) -> Any:
    """The positive prompt with one MODEL, the negative one with another."""
    return nodes_custom_sampler.DualModelGuider.execute(model, prompt(1), 3.0, negative, prompt(2)).result[0]


def perp_neg(model: ModelPatcher) -> Any:
    return nodes_perpneg.PerpNegGuider.execute(model, prompt(1), prompt(2), prompt(3), 3.0, 1.0).result[0]


def skipped_layers(model: ModelPatcher) -> Any:
    """Replaces blocks of the transformer, for a third forward of each step."""
    model = nodes_slg.SkipLayerGuidanceDiT.execute(
        model, double_layers="0", single_layers="0", scale=2.0, start_percent=0.0, end_percent=1.0
    ).result[0]
    return _cfg(model, 3.0)


def easy_cache(model: ModelPatcher) -> Any:
    model = nodes_easycache.EasyCacheNode.execute(model, 10.0, 0.0, 1.0, False).result[0]
    return _cfg(model, 3.0)


def lazy_cache(model: ModelPatcher) -> Any:
    model = nodes_easycache.LazyCacheNode.execute(model, 10.0, 0.0, 1.0, False).result[0]
    return _cfg(model, 3.0)


def controlled(model: ModelPatcher) -> Any:
    """A ControlNet that stays in this process and adds to every block of the model."""
    config = {
        name: value
        for name, value in model.model.model_config.unet_config.items()
        if name not in ("image_model", "disable_unet_model_creation", "dtype")
    }
    torch.manual_seed(9)
    network = ControlNetFlux(**config, operations=comfy.ops.manual_cast, dtype=torch.float32)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    control = comfy.controlnet.ControlNet(network, extra_conds=["y", "guidance"], load_device=torch.device("cpu"))
    hint = torch.rand(1, 3, EVEN[-2] * 8, EVEN[-1] * 8)
    prompts = [
        [
            [
                one[0][0],
                {
                    **one[0][1],
                    "control": control.copy().set_cond_hint(hint, 0.8, (0.0, 1.0)),
                    "control_apply_to_uncond": False,
                },
            ]
        ]
        for one in (prompt(1), prompt(2))
    ]
    return nodes_custom_sampler.CFGGuider.execute(model, *prompts, 3.0).result[0]


def foreign_module(name: str) -> Any:
    """Return a module of the pack of somebody else, imported by its path as ComfyUI imports packs."""
    path = Path(__file__).parent / "foreign_pack" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(str(path.with_suffix("")), path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_a_network(model: ModelPatcher) -> Any:
    model = model.clone()
    model.set_model_post_input_patch(foreign_module("network").Scaled(model.model.diffusion_model.hidden_size))
    return _cfg(model, 3.0)


SETUPS: dict[str, SetUp] = {one.__name__: one for one in (plain, basic_shifted, zero_star_rescaled, skipped_layers)}
MORE_SETUPS: dict[str, SetUp] = {one.__name__: one for one in (dual_cfg, perp_neg, easy_cache, lazy_cache)}
STAYING: dict[str, SetUp] = {one.__name__: one for one in (controlled, with_a_network)}


def _cfg(model: ModelPatcher, cfg: float) -> Any:
    # Prompts of different length, which ComfyUI cannot put into one batch.
    return nodes_custom_sampler.CFGGuider.execute(model, prompt(1), prompt(2, 17), cfg).result[0]


def sample(
    guider: Any,
    sampler: str = "euler",
    masked: bool = False,
    stays_here: bool = False,
    held: Any = None,
    seed: int = 5,
    shape: tuple[int, ...] = SHAPE,
    steps: int = STEPS,
    looks: bool = True,
    callback: Callable[..., None] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """As SamplerCustomAdvanced samples: the latent, and what each step showed if it `looks` at steps, for which another
    `callback` may be given. With `stays_here` the sampler holds something that no other process can have.
    """
    kind = comfy.samplers.sampler_object(sampler)
    if stays_here or held is not None:
        kind.held = held or threading.Lock()
    sigmas = comfy.samplers.calculate_sigmas(guider.model_patcher.get_model_object("model_sampling"), "simple", steps)
    generator = torch.Generator().manual_seed(3)
    latent = torch.randn(shape, generator=generator) if masked else torch.zeros(shape)
    mask = (torch.rand(shape[0], 1, *shape[-2:], generator=generator) > 0.5).float() if masked else None
    noise = comfy.sample.prepare_noise(latent, seed)
    shown = []
    samples = guider.sample(
        noise,
        latent,
        kind,
        sigmas,
        denoise_mask=mask,
        disable_pbar=True,
        seed=seed,
        callback=callback or ((lambda step, x0, x, total: shown.append(x0.clone())) if looks else None),
    )
    return samples, shown
