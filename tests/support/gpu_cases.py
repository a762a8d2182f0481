"""Models, runs and full GPUs for the tests on GPUs: as many workers as there are GPUs, ComfyUI on the first of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras import nodes_custom_sampler
from safetensors.torch import load_file, save_file
from torch import Tensor

from raylight.cluster.config import SessionConfig
from raylight.dev.demo.prompts import random_prompt
from raylight.dev.demo.tiny import write_checkpoint
from raylight.driver import api
from raylight.host.recipe import OFFLOADED, REPLICATED, SHARDED, LoraRecipe, ModelRecipe, RayModel, WorkerConfig
from raylight.parallel.external_strategies import OURS
from raylight.parallel.graphs import AUTO
from raylight.parallel.mesh import MeshShape

GPUS = torch.cuda.device_count()
WORKERS = WorkerConfig(SessionConfig(MeshShape(ulysses=max(1, GPUS)), "cuda"), "TORCH_FLASH")
HEADS = -(-6 // max(1, GPUS)) * max(1, GPUS)  # as many as divide among the workers
WAYS = (REPLICATED, SHARDED, OFFLOADED)
DEPTHS = {"whole run": False, "loop in ComfyUI": True}

SHAPE, TEXT = (1, 16, 5, 30, 52), 4096
# Seconds of a run, and more than a GPU with little room can have, on however many.
LONG, HUGE = (1, 16, 17, 60, 104), (1, 16, 40 * max(1, GPUS) + 1, 120, 208)
HALF, SINGLE = 1e-2, 1e-4
"""The largest relative L2 by what a model is computed in: float16, float32."""


def wan(folder: Path, seed: int = 0) -> Path:
    """A narrow Wan in float16, in which ComfyUI computes it too: workers leave its weights in the file."""
    path = folder / f"wan-{seed}.safetensors"
    if not path.exists():
        write_checkpoint(path, "wan-t2v", heads=HEADS, seed=seed)
        save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)
    return path


def on_workers(
    path: Path,
    sharding: str,
    *loras: tuple[Path, float],
    free_memory_after: bool = False,
    mesh: MeshShape = WORKERS.config.mesh,
    by_run: bool = False,
    attention: str = WORKERS.attention,
    graphs: str = AUTO,
    strategy: str = OURS,
) -> ModelPatcher:
    """The drop-in model of a file."""
    recipes = tuple(LoraRecipe.of(str(lora), strength) for lora, strength in loras)
    config = replace(WORKERS.config, mesh=mesh, by_run=by_run)
    workers = replace(
        WORKERS,
        config=config,
        attention=attention,
        free_memory_after=free_memory_after,
        sharding=sharding,
        graphs=graphs,
        strategy=strategy,
    )
    return api.load(RayModel(workers, ModelRecipe.of(str(path), "default", sharding, recipes)))


def latent(
    model: ModelPatcher,
    stays_here: bool = False,
    shape: tuple[int, ...] = SHAPE,
    steps: int = 2,
    on_step: Callable[[int], None] = lambda _: None,
    tokens: tuple[int, int] = (24, 17),
) -> Tensor:
    """The latent that a sampler makes, float32 on the CPU. With `stays_here` the sampler holds what no other process
    can have, so that its loop stays in this one. `on_step` is called after each step with its number from 0. `tokens`
    are those of the positive and of the negative prompt: of one length, ComfyUI computes them together.
    """
    sampler = comfy.samplers.sampler_object("euler")
    if stays_here:
        sampler.held = threading.Lock()
    prompts = [random_prompt(count, TEXT, seed) for seed, count in enumerate(tokens, start=1)]
    guider: Any = nodes_custom_sampler.CFGGuider.execute(model, *prompts, 3.0).result[0]
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    start = torch.zeros(shape)
    samples = guider.sample(
        comfy.sample.prepare_noise(start, 5),
        start,
        sampler,
        sigmas,
        disable_pbar=True,
        seed=5,
        callback=lambda step, *_: on_step(step),
    )
    return samples.float().cpu()


def error(actual: Tensor, expected: Tensor) -> float:
    """The relative L2 of a latent."""
    return ((actual - expected).norm() / expected.norm()).item()


@contextmanager
def little_room(left_mib: int) -> Iterator[None]:
    """Within it no GPU has more than so much memory free."""
    held = []
    for index in range(GPUS):
        torch.zeros(1, device=f"cuda:{index}")  # what this process takes for itself is taken now
    torch.cuda.empty_cache()
    try:
        for index in range(GPUS):
            free, _ = torch.cuda.mem_get_info(index)
            held.append(torch.empty(max(0, free - (left_mib << 20)), dtype=torch.uint8, device=f"cuda:{index}"))
        yield
    finally:
        held.clear()
        torch.cuda.empty_cache()
