"""The demo's diffusion transformer: a narrow Wan 2.1 of ComfyUI, trained on scenes with the rectified-flow loss."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import comfy.ldm.wan.model
import comfy.model_management
import comfy.ops
import numpy as np
import torch
from torch import Tensor, nn

from raylight.dev.demo.words import WIDTH, encode

from .autoencoder import Codec
from .scenes import draw_scene, render

# ComfyUI reads these from the file's metadata, and the others from the shapes of the weights.
CONFIG: dict[str, Any] = {"dim": 128, "ffn_dim": 384, "num_heads": 4, "num_layers": 4, "text_dim": WIDTH}
WITHOUT_PROMPT = 0.1  # fraction of pictures that are learned without a prompt, for CFG
LEFT_OUT = 0.15  # fraction of prompts without the place, and of those without the time
EMA = 0.995
WARM_UP, DECAY = 100, 600  # steps in which the learning rate rises and, at the end, falls


def build(seed: int) -> nn.Module:
    """Return an untrained model in float32, whose blocks add little at first and whose output is zero."""
    model = comfy.ldm.wan.model.WanModel(
        model_type="t2v",
        in_dim=16,
        out_dim=16,
        freq_dim=256,
        dtype=torch.float32,
        device="cpu",
        operations=comfy.ops.disable_weight_init,
        **CONFIG,
    )
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "modulation" in name:
            nn.init.normal_(parameter, std=CONFIG["dim"] ** -0.5)
        elif parameter.ndim >= 2:
            nn.init.xavier_uniform_(parameter.flatten(1))
        else:
            nn.init.constant_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0)
    nn.init.zeros_(model.head.head.weight)
    return model


def batch_of(generator: random.Random, codec: Codec, count: int) -> tuple[Tensor, Tensor]:
    """Return latents (count, 16, 1, H, W) of random scenes, and their prompts (count, tokens, WIDTH)."""
    pixels, prompts = [], []
    for _ in range(count):
        scene = draw_scene(generator)
        prompt = scene.prompt(generator.random() >= LEFT_OUT, generator.random() >= LEFT_OUT)
        pixels.append(torch.from_numpy(np.array(render(scene))))
        prompts.append(encode("" if generator.random() < WITHOUT_PROMPT else prompt))
    return codec.encode(torch.stack(pixels).permute(0, 3, 1, 2).float() / 255).unsqueeze(2), torch.cat(prompts)


def train(
    codec: Codec,
    steps: int,
    seed: int,
    report: Callable[[int, float], None],
    batch: int = 16,
    learning_rate: float = 2e-3,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Train a model and return its averaged weights.

    Muon trains the matrices of the blocks, in fewer steps than Adam; AdamW trains the rest. Noise levels are drawn as
    in Stable Diffusion 3 (logit-normal), shifted towards the high ones, where most of Wan's sampling steps are. All
    random numbers are drawn on the CPU, so that they are the same for every device.
    """
    comfy.model_management.in_training = True
    model = build(seed).to(device)
    generator = random.Random(seed)
    matrices = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    others = [p for name, p in model.named_parameters() if not (name.startswith("blocks.") and p.ndim == 2)]
    optimizers = [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps)) for optimizer in optimizers
    ]
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(EMA))
    for step in range(steps):
        latents, prompts = batch_of(generator, codec, batch)
        noise = torch.randn_like(latents)
        sigma = torch.sigmoid(0.5 + 1.2 * torch.randn(batch))
        mixed = torch.lerp(latents, noise, sigma.reshape(-1, 1, 1, 1, 1))
        velocity = model(mixed.to(device), sigma.to(device) * 1000, prompts.to(device))
        loss = nn.functional.mse_loss(velocity, (noise - latents).to(device))
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        average.update_parameters(model)
        report(step, loss.item())
    comfy.model_management.in_training = False
    return average.module.state_dict()


def _rate(step: int, steps: int) -> float:
    """Return the factor of the learning rate at a step."""
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / DECAY)
