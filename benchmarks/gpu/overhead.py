"""The cost of Raylight beside stock ComfyUI, per step of a model at full size, with one worker.

    COMFYUI_PATH=/my/ComfyUI python benchmarks/gpu/overhead.py --folder /dev/shm --json overhead.json

Three ways, in turn on one GPU, which holds the model twice: stock ComfyUI in one process; the run on the worker, as the
drop-in MODEL sends it; the sampling loop in ComfyUI, with each forward sent to the worker. A step is the difference
between a run of several steps and a run of one. The model has random weights, which are written to a file in --folder
(28 GB) and read from there by both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from full_size import SIZES, versions, write_checkpoint
from torch import Tensor

STOCK, WORKER, DROP_IN = "stock ComfyUI", "worker loop", "each forward"
GOALS = {WORKER: 1.01, DROP_IN: 1.02}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["wan-480p", "wan-720p", "flux-1024"], choices=SIZES)
    parser.add_argument("--steps", type=int, nargs="+", default=[5], help="of the longer run, for all sizes or each")
    parser.add_argument("--repeats", type=int, nargs="+", default=[3], help="for all sizes, or each")
    parser.add_argument("--layers", type=int, help="this many layers of each kind instead of all")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--folder", type=Path, help="for the file of weights; a temporary one where it is not given")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def sample(model: Any, way: str, name: str, seed: int, steps: int) -> Tensor:
    import comfy.sample
    import comfy.samplers

    sampler = comfy.samplers.sampler_object("euler")
    if way == DROP_IN:
        sampler.held = threading.Lock()  # it cannot be serialized, which keeps the loop in ComfyUI
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    latent = torch.zeros(SIZES[name].latent)
    return comfy.sample.sample_custom(
        model,
        comfy.sample.prepare_noise(latent, seed),
        1.0,
        sampler,
        sigmas,
        *[prompt(name)] * 2,
        latent,
        disable_pbar=True,
        seed=seed,
    )


def prompt(name: str) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    texts = SIZES[name].texts
    tokens = torch.randn(texts["c_crossattn"], generator=generator)
    return [[tokens, {"pooled_output": torch.randn(texts["y"], generator=generator)} if "y" in texts else {}]]


def measure(models: dict[str, Any], name: str, steps: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Return, for each way, the seconds of a step and the relative L2 to ComfyUI's result."""
    taken: dict[str, list[float]] = {way: [] for way in models}
    latents: dict[str, Tensor] = {}
    for way, model in models.items():
        timed(model, way, name, 0, 1)  # loads and warms up
    for turn in range(1, repeats + 1):
        for way, model in models.items():
            # New noise each time: latents that were sent before would not be sent again.
            once, _ = timed(model, way, name, 2 * turn, 1)
            often, latents[way] = timed(model, way, name, 2 * turn + 1, steps)
            taken[way].append((often - once) / (steps - 1))
    expected = latents[STOCK]
    return {
        way: {
            "seconds": statistics.median(taken[way]),
            "all": taken[way],
            "relative_l2": ((latents[way] - expected).norm() / expected.norm()).item(),
        }
        for way in models
    }


def timed(model: Any, way: str, name: str, seed: int, steps: int) -> tuple[float, Tensor]:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the worker needs the memory that this process keeps
    began = time.perf_counter()
    result = sample(model, way, name, seed, steps).float().cpu()
    return time.perf_counter() - began, result


@torch.inference_mode()
def main() -> None:
    options = parsed()
    import comfy.model_management
    import comfy.sd

    from raylight.cluster import active_session
    from raylight.cluster.config import SessionConfig
    from raylight.driver import api
    from raylight.host.recipe import ModelRecipe, RayModel, WorkerConfig
    from raylight.parallel.mesh import MeshShape

    workers = WorkerConfig(SessionConfig(MeshShape(), options.device), options.attention)
    figures: dict[str, Any] = {"versions": versions(), "attention": options.attention}
    print(figures["versions"])
    steps, repeats = (
        given * len(options.sizes) if len(given) == 1 else given for given in (options.steps, options.repeats)
    )
    print(f"{'':<34} {'way':<14} {'s a step':>9} {'of stock':>9} {'goal':>5} {'relative L2':>11}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path, of_file = Path(folder) / "model.safetensors", None
        for name, count, turns in zip(options.sizes, steps, repeats, strict=True):
            if (SIZES[name].family, SIZES[name].widths) != of_file:
                comfy.model_management.unload_all_models()
                path.unlink(missing_ok=True)
                write_checkpoint(name, path, torch.device(options.device), options.layers)
                of_file = SIZES[name].family, SIZES[name].widths
                remote = api.load(RayModel(workers, ModelRecipe.of(str(path), "default")))
                models = {STOCK: comfy.sd.load_diffusion_model(str(path)), WORKER: remote, DROP_IN: remote}
            found = measure(models, name, count, turns)
            for way, row in found.items():
                ratio = row["seconds"] / found[STOCK]["seconds"]
                print(
                    f"{SIZES[name].title if way == STOCK else '':<34} {way:<14} {row['seconds']:>9.4f} {ratio:>9.4f} "
                    f"{GOALS.get(way, ''):>5} {row['relative_l2']:>11.1e}",
                    flush=True,
                )
            figures[name] = found
            if options.json:
                options.json.write_text(json.dumps(figures, indent=1))
    active_session.close()


if __name__ == "__main__":
    main()
