"""Speed-up of one denoising step over ranks, each with one thread.

All figures of a table are measured in one run: the numbers of ranks take turns, and medians are compared.
Communication is the time spent in exchanges and gathers, including the wait for slower ranks.

    COMFYUI_PATH=/my/ComfyUI python benchmarks/scaling.py --ranks 1 2

For GPUs see benchmarks/gpu/prediction.py and multi.py.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from raylight.dev.local_ranks import run_ranks, values

WIDE = {
    "wan": ("Wan T2V", {"dim": 1536, "ffn_dim": 4096, "num_heads": 12, "num_layers": 2}, (1, 16, 5, 44, 60)),
    "flux": (
        "Flux Schnell",
        {
            "hidden_size": 1536,
            "num_heads": 12,
            "depth": 1,
            "depth_single_blocks": 2,
            "axes_dim": [16, 56, 56],
            "mlp_ratio": 4.0,
        },
        (1, 16, 98, 98),
    ),
}


def step(rank: int, world: int, name: str, ring: int, repeats: int) -> tuple[list[float], list[float]]:
    """Return the seconds of each of `repeats` forwards of the model, and of their communication."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    from comfy.cli_args import args

    args.cpu = True  # before ComfyUI's modules choose a device
    import dataclasses

    import raylight.parallel.hooks
    import raylight.parallel.ulysses
    from raylight.attention.kernels import kernel
    from raylight.dev.zoo import families
    from raylight.dev.zoo.family import Draw
    from raylight.parallel.mesh import MeshShape, build_mesh
    from raylight.plans import plan_for
    from raylight.worker.sequence_parallel import apply_sequence_parallel

    spent = [0.0]

    def timed(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            began = time.perf_counter()
            result = function(*arguments)
            spent[0] += time.perf_counter() - began
            return result

        return call

    start_exchange = timed(raylight.parallel.ulysses.start_exchange)

    def started(*arguments: Any) -> Any:
        received, work = start_exchange(*arguments)
        return received, SimpleNamespace(wait=timed(work.wait))

    raylight.parallel.ulysses.start_exchange = started
    raylight.parallel.ulysses.exchange = timed(raylight.parallel.ulysses.exchange)
    raylight.parallel.hooks.all_gather = timed(raylight.parallel.hooks.all_gather)

    family_name, changes, shape = WIDE[name]
    family = families()[family_name]
    model = dataclasses.replace(family, unet_config={**family.unet_config, **changes}).build()
    inputs = next(iter(family.calls.values()))(Draw(1)) | {"x": Draw(2)(*shape)}
    options: dict[str, Any] = {}
    mesh = build_mesh(MeshShape(ring=ring, ulysses=world // ring), torch.device("cpu"))
    split = apply_sequence_parallel(model.diffusion_model, plan_for(model.diffusion_model), mesh)
    split.install(options, kernel("TORCH_FLASH"))
    seconds, communication = [], []
    with torch.inference_mode():
        for turn in range(repeats + 1):
            spent[0], began = 0.0, time.perf_counter()
            model.apply_model(**inputs, transformer_options=dict(options["transformer_options"]))
            if turn:  # the first is warm-up
                seconds.append(time.perf_counter() - began)
                communication.append(spent[0])
    return seconds, communication


def main() -> None:
    """Measure and print one table per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--models", nargs="+", choices=WIDE, default=list(WIDE))
    parser.add_argument("--ring", type=int, default=1, help="ranks in the ring, the rest in Ulysses")
    parser.add_argument("--rounds", type=int, default=3, help="how often the counts of ranks take turns")
    parser.add_argument("--repeats", type=int, default=3, help="forwards in each round")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, one thread for each rank, float32")
    for name in options.models:
        taken: dict[int, list[float]] = {world: [] for world in options.ranks}
        shares: dict[int, list[float]] = {world: [] for world in options.ranks}
        for _ in range(options.rounds):
            for world in options.ranks:
                ring = options.ring if world % options.ring == 0 else 1
                answers = values(run_ranks(world, step, name, ring, options.repeats, timeout_s=600))
                for turn in range(options.repeats):
                    slowest = max(answer[0][turn] for answer in answers)
                    taken[world].append(slowest)
                    shares[world].append(statistics.mean(answer[1][turn] for answer in answers) / slowest)
        base = statistics.median(taken[options.ranks[0]])
        print(f"\n{name}: latent {WIDE[name][2]}")
        print("ranks   s/step   speed-up   efficiency   communication")
        for world in options.ranks:
            median = statistics.median(taken[world])
            speed_up = base / median * options.ranks[0]
            print(
                f"{world:>5} {median:>8.3f} {speed_up:>9.2f}x {speed_up / world:>11.0%} "
                f"{statistics.median(shares[world]):>14.1%}"
            )


if __name__ == "__main__":
    main()
