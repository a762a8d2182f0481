"""The time of a prompt before its first denoising step: the first one, one with a new seed or another LoRA strength.

Two workers on the CPU sample a small Wan. A prompt is timed with one step and with four, in turn; the former less one
step is the time before the first step. Medians, and fractions of a step.

    COMFYUI_PATH=/my/ComfyUI python benchmarks/second_prompt.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support"), os.environ["COMFYUI_PATH"]]
sys.path.append(str(ROOT))

from comfy.cli_args import args as comfy_args

comfy_args.cpu = True  # before ComfyUI's modules choose a device

import comfy.sample
import torch
from loras import lora_for
from safetensors.torch import load_file, save_file

from raylight.cluster import active_session
from raylight.cluster.config import SessionConfig
from raylight.dev.demo.prompts import random_prompt
from raylight.dev.demo.tiny import write_checkpoint
from raylight.driver import api
from raylight.host.recipe import REPLICATED, SHARDED, LoraRecipe, ModelRecipe, RayModel, WorkerConfig
from raylight.parallel.mesh import MeshShape

WORKERS = WorkerConfig(SessionConfig(MeshShape(ulysses=2), "cpu"), "TORCH_FLASH")
LATENT = (1, 16, 3, 30, 40)
STEPS = 4


def seconds(model: RayModel, seed: int, steps: int) -> float:
    """Return the seconds of a prompt, from the sampler node's call to the latent."""
    prompt = random_prompt(32, 4096, 1)
    began = time.perf_counter()
    patcher = api.load(model)  # as the loader node does
    latent = torch.zeros(LATENT)
    comfy.sample.sample(
        patcher,
        comfy.sample.prepare_noise(latent, seed),
        steps,
        1.0,
        "euler",
        "simple",
        prompt,
        prompt,
        latent,
        disable_pbar=True,
        seed=seed,
    )
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        path, lora = Path(temporary) / "wan.safetensors", Path(temporary) / "lora.safetensors"
        write_checkpoint(path, "wan-t2v", heads=12, layers=4)
        save_file(
            lora_for({f"diffusion_model.{name}": tuple(t.shape) for name, t in load_file(path).items()}, ["lora"], 1),
            lora,
        )
        print(f"{'seconds':<34} {'a step':>8} {'before it':>10} {'of a step':>10}")
        for sharding in (REPLICATED, SHARDED):
            _report(str(path), str(lora), sharding, options.repeats)
        active_session.close()


def _report(path: str, lora: str, sharding: str, repeats: int) -> None:
    def model(strength: float | None) -> RayModel:
        loras = () if strength is None else (LoraRecipe.of(lora, strength),)
        return RayModel(WORKERS, ModelRecipe.of(path, "default", sharding, loras))

    first = seconds(model(None), 0, 1)
    kinds: dict[str, list[tuple[float, float]]] = {"the same model, a new seed": [], "another LoRA strength": []}
    for turn in range(repeats):
        for kind, taken in kinds.items():
            # Before each of the two the LoRA has another strength, and is taken away before the other kind.
            strengths = (None, None) if kind.startswith("the same") else (0.5 + turn, 0.7 + turn)
            seconds(model(strengths[0]), turn, 1)
            one = seconds(model(strengths[1]), turn, 1)
            seconds(model(strengths[0]), turn, 1)
            many = seconds(model(strengths[1]), turn, STEPS)
            step = (many - one) / (STEPS - 1)
            taken.append((step, one - step))
    step = statistics.median(step for step, _ in kinds["the same model, a new seed"])
    print(f"{sharding + ', the first prompt':<34} {step:8.2f} {first - step:10.2f} {(first - step) / step:10.2f}")
    for kind, taken in kinds.items():
        before = statistics.median(before for _, before in taken)
        print(f"{sharding + ', ' + kind:<34} {step:8.2f} {before:10.2f} {before / step:10.2f}")


if __name__ == "__main__":
    main()
