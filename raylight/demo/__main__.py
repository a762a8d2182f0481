"""`make demo`: one picture by stock ComfyUI nodes and the same by workers, in one real ComfyUI."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from .comfy_replies import ComfyError
from .comfy_server import ComfyServer
from .graphs import Graph, Sampling, on_workers, stock
from .picture import write_animation
from .prompts import random_prompt, write_prompt

TOLERANCE = 1e-4
MODEL = "raylight-demo-wan.safetensors"


@dataclass(frozen=True, slots=True)
class Result:
    """One sampled latent (1, C, T, H, W), and the seconds that one step took."""

    latent: Tensor
    step_s: float


def main(arguments: list[str]) -> int:
    """Run the demo. Returns 0 when both results agree."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--workers", type=int, default=2, help="how many workers (default 2)")
    parser.add_argument("--steps", type=int, default=8, help="sampler steps (default 8)")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="where the pictures go")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")

    work = options.output / "comfyui"
    shutil.rmtree(work, ignore_errors=True)
    models, prompts = work / "models", work / "datasets"
    print("writing a small Wan checkpoint with random weights", flush=True)
    _write_checkpoint(models / MODEL)
    write_prompt(prompts / "positive", random_prompt(24, 4096, seed=1))
    write_prompt(prompts / "negative", random_prompt(17, 4096, seed=2))

    job = Sampling(MODEL, width=240, height=176, frames=17, steps=options.steps)
    print("starting ComfyUI", flush=True)
    try:
        with ComfyServer(work, model_paths={"diffusion_models": models, "datasets": prompts}) as server:
            expected = _sample(server, "stock", stock(job))
            actual = _sample(server, "raylight", on_workers(job, options.workers))
            print("stopping ComfyUI and its workers", flush=True)
    except (ComfyError, ConnectionError, TimeoutError) as error:
        print(f"the demo failed: {error}\nComfyUI's log: {work / 'comfyui.log'}", file=sys.stderr)
        return 1

    for name, result in (("stock", expected), ("raylight", actual)):
        path = write_animation(result.latent, *_colours(), options.output / name)
        print(f"{name + ':':<10} {path}   {result.step_s:.3f} s per step")
    difference = ((actual.latent - expected.latent).abs().max() / expected.latent.std()).item()
    agrees = difference <= TOLERANCE
    print(f"max difference: {difference:.1e} of the standard deviation "
          f"({'within' if agrees else 'MORE THAN'} {TOLERANCE:.0e})")
    return 0 if agrees else 1


def _sample(server: ComfyServer, name: str, graph: Graph) -> Result:
    """Run a graph twice, with another seed first: the run that is timed finds its model loaded."""
    print(f"sampling: {name}", flush=True)
    warm_up = {key: dict(node, inputs=dict(node["inputs"])) for key, node in graph.items()}
    warm_up["sample"]["inputs"]["noise_seed"] += 1
    server.run(warm_up, timeout=600)
    with server.listen() as listener:
        prompt = server.submit(graph)
        moments = [
            _moment(listener, prompt, lambda value, _: value == 1), _moment(listener, prompt, lambda v, last: v == last)
        ]
        history = server.wait(prompt, timeout=600)
    steps = graph["sample"]["inputs"]["steps"]
    latent = load_file(server.output_files(history, "save")[0])["latent_tensor"]
    return Result(latent, (moments[1] - moments[0]) / max(1, steps - 1))


def _moment(listener, prompt, matches) -> float:
    """When the sampler's progress first matched, in seconds of the monotonic clock."""
    def is_it(message) -> bool:
        data = getattr(message, "data", {})
        return (getattr(message, "type", "") == "progress" and data.get("prompt_id") == prompt
                and data.get("node") == "sample" and matches(data["value"], data["max"]))

    listener.wait_for(is_it, timeout=600)
    return time.monotonic()


def _write_checkpoint(path: Path) -> None:
    _find_comfyui()
    from .tiny import write_checkpoint  # after ComfyUI's code can be found

    write_checkpoint(path, "wan-t2v", heads=4, layers=4)


def _colours() -> tuple[list[list[float]], list[float] | None]:
    from comfy.latent_formats import Wan21

    return Wan21().latent_rgb_factors, Wan21().latent_rgb_factors_bias


def _find_comfyui() -> None:
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    from comfy.cli_args import args

    args.cpu = True  # the checkpoint is written by the CPU alone


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("interrupted: ComfyUI and its workers are stopped", file=sys.stderr)
        sys.exit(130)
