"""The cost of the drop-in MODEL beside stock ComfyUI, per step, with one worker: milliseconds, and bytes sent.

One worker samples latents of usual sizes (Wan 480p with 81 frames, Flux 1024) with a model that is small and, unless
--attention is given, has no attention, so that the overhead is what is measured. Three ways, in turn: stock ComfyUI in
one process; the run sent to the worker; the sampling loop in ComfyUI, with each forward sent to the worker. A step is
the median difference between a run of several steps and a run of one. "Sent a run" is for a run of one step whose
conditioning has been sent before.

    COMFYUI_PATH=/my/ComfyUI python benchmarks/dropin.py
    COMFYUI_PATH=/my/ComfyUI python benchmarks/dropin.py --device cuda --attention
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support"), os.environ["COMFYUI_PATH"]]
sys.path.append(str(ROOT))

PARSER = argparse.ArgumentParser(description=__doc__.splitlines()[0])
PARSER.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
PARSER.add_argument("--attention", action="store_true", help="with attention, which takes long on a CPU")
PARSER.add_argument("--repeats", type=int, default=5)
PARSER.add_argument("--steps", type=int, default=5)
OPTIONS = PARSER.parse_args()

from comfy.cli_args import args as comfy_args

comfy_args.cpu = OPTIONS.device == "cpu"  # before ComfyUI's modules choose a device

import comfy.sample
import comfy.samplers
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher

from raylight.cluster import active_session
from raylight.cluster.config import SessionConfig
from raylight.cluster.session import Session
from raylight.dev.demo.prompts import random_prompt
from raylight.dev.demo.tiny import write_checkpoint
from raylight.driver import api
from raylight.host.recipe import ModelRecipe, RayModel, WorkerConfig
from raylight.parallel.mesh import MeshShape

WAN, FLUX = (1, 16, 21, 60, 104), (1, 16, 128, 128)
WAYS = ("stock", "whole run", "each forward")


def cases() -> dict[str, tuple[str, tuple[int, ...], float, list[list[Any]]]]:
    """Return by name: model, shape of the latent, CFG, prompts. A start image has 20 constant channels."""
    image = {"concat_latent_image": torch.randn(WAN), "concat_mask": torch.ones(1, 1, *WAN[2:])}
    return {
        "Wan 480p 81 frames": ("wan-t2v", WAN, 1.0, [random_prompt(512, 4096, 1)] * 2),
        "the same with CFG": ("wan-t2v", WAN, 5.0, [random_prompt(512, 4096, seed) for seed in (1, 2)]),
        "the same from an image": ("wan-i2v", WAN, 1.0, [random_prompt(512, 4096, 1, **image)] * 2),
        "Flux 1024": ("flux-dev", FLUX, 1.0, [random_prompt(512, 160, 1, 96)] * 2),
    }


class Traffic:
    """Bytes of tensors that are sent between ComfyUI and the workers."""

    def __init__(self) -> None:
        self.sent = self.received = 0
        own = Session.run_all

        def run_all(
            session: Session, verb: Callable[..., Any], *args: Any, on_event: Any = lambda _: None, **named: Any
        ) -> Any:
            self.sent += sum(map(size, args))

            def count(event: Any) -> None:
                self.received += size(event)
                on_event(event)

            answers = own(session, verb, *args, on_event=count, **named)
            self.received += sum(map(size, answers.values()))
            return answers

        Session.run_all = run_all

    def reset(self) -> None:
        self.sent = self.received = 0


def size(value: Any) -> int:
    """Return the bytes of the tensors and serialized objects in a value."""
    if hasattr(value, "nbytes"):
        return value.nbytes
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(size, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(size, value))
    slots = getattr(type(value), "__slots__", ()) if type(value).__module__.startswith("raylight") else ()
    return sum(size(getattr(value, name)) for name in slots if hasattr(value, name))


def without_attention(model: ModelPatcher) -> ModelPatcher:
    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = values_only
    return model


def values_only(
    func: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    *_: Any,
    skip_reshape: bool = False,
    **__: Any,
) -> torch.Tensor:
    """Replace attention: return the queries, which have the shape of its result."""
    return q.transpose(1, 2).flatten(2) if skip_reshape else q


def sample(
    model: ModelPatcher, way: str, seed: int, shape: tuple[int, ...], cfg: float, prompts: list[Any], steps: int
) -> torch.Tensor:
    sampler = comfy.samplers.sampler_object("euler")
    if way == WAYS[2]:
        sampler.held = threading.Lock()  # which no other process can have
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    latent = torch.zeros(shape)
    return comfy.sample.sample_custom(
        model,
        comfy.sample.prepare_noise(latent, seed),
        cfg,
        sampler,
        sigmas,
        *prompts,
        latent,
        disable_pbar=True,
        seed=seed,
    )


@torch.inference_mode()
def main() -> None:
    traffic = Traffic()
    workers = WorkerConfig(SessionConfig(MeshShape(), OPTIONS.device), "auto")
    print(
        f"{'':<26} {'way':<14} {'ms a step':>10} {'over stock':>11} {'sent a run':>11} {'sent a step':>12} "
        f"{'back a step':>12} (bytes) {'relative L2':>11}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, (family, *run) in cases().items():
            path = Path(folder) / f"{family}.safetensors"
            if not path.exists():
                write_checkpoint(path, family, heads=1 if family.startswith("wan") else 3, layers=1)
            remote = api.load(RayModel(workers, ModelRecipe.of(str(path), "default")))
            models = {WAYS[0]: comfy.sd.load_diffusion_model(str(path)), WAYS[1]: remote, WAYS[2]: remote}
            _report(name, models, run, traffic)
    active_session.close()


def _report(name: str, models: dict[str, ModelPatcher], run: list[Any], traffic: Traffic) -> None:
    steps, seconds = OPTIONS.steps, defaultdict(list)
    sent: dict[str, tuple[int, int, int]] = {}
    latents: dict[str, torch.Tensor] = {}
    for turn in range(OPTIONS.repeats + 1):
        for way, model in models.items():
            model = model if OPTIONS.attention else without_attention(model)
            taken, moved = [], []
            for count in (1, steps):
                traffic.reset()
                began = time.perf_counter()
                # Other noise each time: of latents that come again nothing would be sent.
                latents[way] = sample(model, way, 2 * turn + len(taken), *run, count).float().cpu()
                taken.append(time.perf_counter() - began)
                moved.append((traffic.sent, traffic.received))
            (once, back_once), (often, back_often) = moved
            sent[way] = once, (often - once) // (steps - 1), (back_often - back_once) // (steps - 1)
            if turn:  # the first loads and warms up
                seconds[way].append((taken[1] - taken[0]) / (steps - 1))
    stock = statistics.median(seconds[WAYS[0]])
    for way in models:
        step = statistics.median(seconds[way])
        once, more, back = sent[way]
        print(
            f"{name:<26} {way:<14} {1e3 * step:10.1f} {1e3 * (step - stock):11.1f} {once:11,} {more:12,} {back:12,}"
            f" {_relative(latents[way], latents[WAYS[0]]):19.1e}",
            flush=True,
        )
        name = ""


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


if __name__ == "__main__":
    main()
