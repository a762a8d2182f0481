"""Raylight beside what else splits a run of ComfyUI over GPUs, in one run, through the product: seconds of a step.

    COMFYUI_PATH=/my/ComfyUI python benchmarks/gpu/peers.py --folder /dev/shm --layers 10 --json peers.json

Beside stock ComfyUI on one GPU: ComfyUI's own MultiGPU CFG Split on two; Raylight with its own exchange, with that of
yunchang and of xfuser where they are installed, and with its own in 8 bits (`sequence_attention`). All with one
attention kernel, by default the one that stock takes. A step has a positive and a negative prompt (CFG); with --no-cfg
it has one. It is the difference between a run of several steps and a run of one. Each way runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from full_size import SIZES, versions, write_checkpoint
from measure import relative
from torch import Tensor

CFG = 5.0
SPLIT = "ComfyUI, MultiGPU CFG Split"


class Way(NamedTuple):
    """A way to use GPUs. Without `mesh` (batch, ring, ulysses) it is ComfyUI without Raylight."""

    name: str
    gpus: int
    mesh: tuple[int, int, int] | None = None
    strategy: str = "raylight"


def ways(gpus: int, cfg: bool) -> list[Way]:
    found = [Way("stock ComfyUI", 1)]
    if gpus >= 2 and cfg:
        found += [Way(SPLIT, 2), Way("cfg 2", 2, (2, 1, 1))]
    others = ("yunchang", "xfuser", "raylight_int8")
    for count in (2, 4):
        if count <= gpus:
            found += [Way(f"ulysses {count}", count, (1, 1, count))]
            found += [Way(f"ulysses {count}, {by}", count, (1, 1, count), by) for by in others]
            found += [Way(f"ring {count}", count, (1, count, 1))]
    if gpus >= 4 and cfg:
        found += [Way("cfg 2 x ulysses 2", 4, (2, 1, 2))]
    return found


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="wan-480p", choices=SIZES)
    parser.add_argument("--layers", type=int, help="this many layers of each kind instead of all")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-cfg", action="store_true")
    parser.add_argument("--attention", default="TORCH_FLASH")
    parser.add_argument("--gpus", type=int)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--folder", type=Path, help="for the file of weights; a temporary one where it is not given")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # a way, the weights, and the file of the result
    return parser.parse_args()


def prompt(name: str, seed: int) -> list[Any]:
    generator, texts = torch.Generator().manual_seed(seed), SIZES[name].texts
    tokens = torch.randn(texts["c_crossattn"], generator=generator)
    return [[tokens, {"pooled_output": torch.randn(texts["y"], generator=generator)} if "y" in texts else {}]]


def sample(model: Any, options: argparse.Namespace, seed: int, steps: int) -> tuple[float, Tensor]:
    """Return the seconds of a run, and its latent in float32 on the CPU."""
    import comfy.sample
    import comfy.samplers

    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    latent = torch.zeros(SIZES[options.size].latent)
    noise = comfy.sample.prepare_noise(latent, seed)
    began = time.perf_counter()
    result = comfy.sample.sample_custom(
        model,
        noise,
        1.0 if options.no_cfg else CFG,
        comfy.samplers.sampler_object("euler"),
        sigmas,
        prompt(options.size, 1),
        prompt(options.size, 2),
        latent,
        disable_pbar=True,
        seed=seed,
    )
    result = result.float().cpu()
    return time.perf_counter() - began, result


def loaded(way: Way, path: str, options: argparse.Namespace) -> Any:
    """Return ComfyUI's MODEL of the file for this way."""
    import comfy.sd

    if way.mesh is None:
        model = comfy.sd.load_diffusion_model(path)
        if way.name == SPLIT:
            import comfy.multigpu

            return comfy.multigpu.create_multigpu_deepclones(model, way.gpus, reuse_loaded=True)
        return model
    from raylight.cluster.config import SessionConfig
    from raylight.driver import api
    from raylight.host.recipe import ModelRecipe, RayModel, WorkerConfig
    from raylight.parallel.mesh import MeshShape

    batch, ring, ulysses = way.mesh
    session = SessionConfig(MeshShape(batch, ring, ulysses), options.device)
    workers = WorkerConfig(session, options.attention, strategy=way.strategy)
    return api.load(RayModel(workers, ModelRecipe.of(path, "default")))


@torch.inference_mode()
def one(name: str, path: str, result: str, options: argparse.Namespace) -> None:
    """Measure one way in this process, print its seconds of a step, and write its latent to the file `result`."""
    import comfy.sd  # noqa: F401  # as ComfyUI has imported it when it runs a node

    way = next(way for way in ways(8, not options.no_cfg) if way.name == name)
    model = loaded(way, path, options)
    for steps in (options.steps, 1):  # loads and warms up
        sample(model, options, 0, steps)
    taken = []
    for turn in range(1, options.repeats + 1):
        once, _ = sample(model, options, 2 * turn, 1)
        often, latent = sample(model, options, 2 * turn + 1, options.steps)
        taken.append((often - once) / (options.steps - 1))
    torch.save(latent, result)
    print("seconds", statistics.median(taken))
    if way.mesh is not None:
        from raylight.cluster import active_session

        active_session.close()


def main() -> None:
    options = parsed()
    if options.one:
        one(*options.one, options)
        return
    gpus = options.gpus or (torch.cuda.device_count() if options.device == "cuda" else 2)
    figures: dict[str, Any] = {"versions": versions(), "attention": options.attention}
    print(figures["versions"])
    print(f"{SIZES[options.size].title}, {options.layers or 'all'} layers, {'no CFG' if options.no_cfg else 'CFG'}")
    print(f"{'GPUs':>4} {'way':<28} {'s a step':>9} {'of stock':>9} {'relative L2':>11}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "model.safetensors"
        write_checkpoint(options.size, path, torch.device(options.device), options.layers)
        given = [argument for argument in sys.argv[1:] if argument]
        expected, stock = None, 0.0
        for way in ways(gpus, not options.no_cfg):
            result = Path(folder) / "latent.pt"
            process = subprocess.run(
                [sys.executable, __file__, *given, "--one", way.name, str(path), str(result)],
                capture_output=True,
                text=True,
                timeout=600,
            )
            line = next((line for line in process.stdout.splitlines() if line.startswith("seconds")), None)
            if line is None:
                reason = (process.stderr.strip().splitlines() or ["no output"])[-1]
                figures[way.name] = {"failed": process.stderr[-4000:]}
                print(f"{way.gpus:>4} {way.name:<28} {reason[:150]}", flush=True)
                continue
            seconds, latent = float(line.split()[1]), torch.load(result)
            if expected is None:
                expected, stock = latent, seconds
            error = relative(latent, expected)
            figures[way.name] = {"gpus": way.gpus, "seconds": seconds, "relative_l2": error}
            print(f"{way.gpus:>4} {way.name:<28} {seconds:>9.4f} {stock / seconds:>8.2f}x {error:>11.1e}", flush=True)
            if options.json:
                options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
