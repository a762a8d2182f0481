"""Speed-up of a step on two machines over links of several speeds, beside stock ComfyUI on one of them.

The machines are two on this one: network namespaces with an address, folders and a Ray node of their own, and a link
whose two ends send no faster than is told (`tc`, a token bucket). Each rank has one thread, and so has stock ComfyUI.
For each link and way, runs of stock ComfyUI and runs on the workers take turns, and the best steps of both are
compared: on a machine that does other things too, the best is what the work takes. `pairs` is the median of the ratios
of runs that came one after the other. `sent` is what a machine has sent over the link in a step.

It needs root's rights (for namespaces), `ip`, `tc` and two idle cores.

    COMFYUI_PATH=/my/ComfyUI python benchmarks/cluster.py
    COMFYUI_PATH=/my/ComfyUI python benchmarks/cluster.py --links 10gbit 1gbit 100mbit --ways "cfg 2"
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support"), os.environ["COMFYUI_PATH"]]
sys.path.append(str(ROOT))

# By name: the sizes of the mesh (batch, ring, ulysses), and the sharding mode.
WAYS = {
    "cfg 2": ((2, 1, 1), "replicated"),
    "ulysses 2": ((1, 1, 2), "replicated"),
    "ring 2": ((1, 2, 1), "replicated"),
    "cfg 2, FSDP": ((2, 1, 1), "sharded"),
}
FAMILY, HEADS, LAYERS = "wan-t2v", 8, 2
LATENT = (1, 16, 1, 60, 104)  # one frame of 832x480: 1,560 tokens
TOKENS = 64  # of each prompt
CFG = 5.0

PARSER = argparse.ArgumentParser(description=__doc__.splitlines()[0])
PARSER.add_argument("--links", nargs="+", default=["10gbit", "1gbit"], help="rates as `tc` has them")
PARSER.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
PARSER.add_argument("--rounds", type=int, default=4, help="how often stock ComfyUI and the workers take turns")
PARSER.add_argument("--steps", type=int, default=3, help="of each run; the first one is not counted")
PARSER.add_argument("--driver", nargs=3, metavar=("ADDRESS", "FILE", "LINK"), help=argparse.SUPPRESS)
OPTIONS = PARSER.parse_args()


def main() -> None:
    """Start the machines, and ComfyUI's process on the first for each link."""
    import machines

    if why := machines.why_not():
        sys.exit(f"no machines: {why}")
    cluster = machines.FakeCluster()
    try:
        folder = cluster.alpha.folder / cluster.alpha.models
        path = folder / "model.safetensors"
        subprocess.run([sys.executable, __file__, "--driver", "", str(path), ""], check=True)
        here = cluster.alpha.here / cluster.alpha.models / path.name
        for link in OPTIONS.links:
            cluster.limit(link)
            options = ["--rounds", str(OPTIONS.rounds), "--steps", str(OPTIONS.steps)]
            options += ["--ways", *OPTIONS.ways, "--links", *OPTIONS.links]
            driver = [sys.executable, __file__, *options, "--driver", cluster.address, here, link]
            subprocess.run(
                cluster.alpha.command(*driver),
                env=cluster.alpha.environment,
                stderr=(cluster.base / "driver.log").open("a"),
                check=True,
            )
    except BaseException:
        sys.stderr.write(cluster.log()[-4000:])
        raise
    finally:
        cluster.end()


def measure(address: str, path: str, link: str) -> None:
    """Write the model to `path` if there is none yet; else print the lines of one link."""
    from comfy.cli_args import args

    args.cpu = True  # before ComfyUI's modules choose a device
    args.use_pytorch_cross_attention = True  # as the workers: on a CPU, ComfyUI's own choice is slower
    import comfy.sd
    import torch

    from raylight.dev.demo.tiny import write_checkpoint

    torch.set_num_threads(1)
    if not os.path.exists(path):
        write_checkpoint(Path(path), FAMILY, heads=HEADS, layers=LAYERS)
        return
    from machines import COUNTERS, sent_bytes

    from raylight.cluster import active_session
    from raylight.cluster.config import SessionConfig
    from raylight.driver import api
    from raylight.host.recipe import ModelRecipe, RayModel, WorkerConfig
    from raylight.parallel.mesh import MeshShape

    stock = comfy.sd.load_diffusion_model(path)
    _, expected = steps_of(stock)
    if link == OPTIONS.links[0]:
        print(
            f"torch {torch.__version__}, one thread for each rank, {os.cpu_count()} cores, float32: {FAMILY} of "
            f"{os.path.getsize(path) / 1e6:.0f} MB, latent {LATENT}, CFG"
        )
    print(f"{link:<10} {'':<12} {'s/step':>8} {'stock':>8} {'speed-up':>9} {'pairs':>7} {'sent':>9} {'error':>8}")
    for way in OPTIONS.ways:
        shape, sharding = WAYS[way]
        workers = WorkerConfig(SessionConfig(MeshShape(*shape), "cpu", address), "TORCH_FLASH", sharding=sharding)
        model = api.load(RayModel(workers, ModelRecipe.of(path, "default", sharding)))
        _, actual = steps_of(model)  # loads, and sends the file
        ours, theirs, ratios, sent = [], [], [], []
        for _ in range(OPTIONS.rounds):
            alone, _ = steps_of(stock)
            before = sent_bytes(Path(COUNTERS).read_text())
            together, _ = steps_of(model)
            sent.append((sent_bytes(Path(COUNTERS).read_text()) - before) / OPTIONS.steps)
            theirs += alone
            ours += together
            ratios.append(min(alone) / min(together))
        error = ((actual - expected).abs().max() / expected.std()).item()
        print(
            f"{'':<10} {way:<12} {min(ours):8.3f} {min(theirs):8.3f} {min(theirs) / min(ours):8.2f}x "
            f"{statistics.median(ratios):6.2f}x {statistics.median(sent) / 1e6:6.1f} MB {error:8.0e}",
            flush=True,
        )
    active_session.close()


def steps_of(model: Any) -> tuple[list[float], Any]:
    """Return the seconds of each step of a run but the first, and the latent."""
    import comfy.sample
    import torch

    from raylight.dev.demo.prompts import random_prompt

    at: list[float] = []
    latent = torch.zeros(LATENT)
    with torch.inference_mode():
        result = comfy.sample.sample(
            model,
            comfy.sample.prepare_noise(latent, 1),
            OPTIONS.steps,
            CFG,
            "euler",
            "simple",
            random_prompt(TOKENS, 4096, 1),
            random_prompt(TOKENS, 4096, 2),
            latent,
            callback=lambda *_: at.append(time.perf_counter()),
            disable_pbar=True,
            seed=1,
        )
    return [after - before for before, after in pairwise(at)], result


if __name__ == "__main__":
    if OPTIONS.driver:
        measure(*OPTIONS.driver)
    else:
        main()
