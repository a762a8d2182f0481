"""`make demo`: pictures by stock ComfyUI nodes and the same by workers, in one real ComfyUI."""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from . import drawing
from .comfy_replies import ComfyError
from .comfy_server import ComfyServer
from .graphs import Graph, Sampling
from .picture import write_sheet
from .train.scenes import COLOURS, PLACES, SIZE, THINGS, TIMES
from .words import split

TOLERANCE = 1e-4
HERE = Path(__file__).resolve().parent
MODEL, VAE = "raylight-demo.safetensors", "raylight-demo-vae.safetensors"
PROMPTS = (
    "a red house in the snow at night",
    "a blue boat on the sea at sunset",
    "a pink tree in a meadow by day",
    "a yellow balloon in the desert by day",
)
SEED = 7


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one way of sampling: a latent (1, 16, 1, H, W) and a picture per prompt, and seconds per step."""

    latents: list[Tensor]
    pictures: list[Path]
    step_s: float


def main(arguments: list[str]) -> int:
    """Run the demo. Returns 0 when all results agree."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument(
        "--prompt",
        action="append",
        help='what to draw, for example "a green car in the desert at night"; can be given several times',
    )
    parser.add_argument("--workers", type=int, default=2, help="how many workers (default 2)")
    parser.add_argument("--steps", type=int, default=20, help="sampler steps (default 20)")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="where the pictures go")
    parser.add_argument("--stay", action="store_true", help="leave ComfyUI running at the end, to type prompts there")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if not (HERE / "model" / MODEL).is_file():
        print(
            f"the demo's model is not in {HERE / 'model'}: packages from ComfyUI's registry come without it. "
            "Clone the repository.",
            file=sys.stderr,
        )
        return 1

    prompts = options.prompt or list(PROMPTS)
    _warn_of_words(prompts)
    work = options.output / "comfyui"
    shutil.rmtree(work, ignore_errors=True)
    folders = {"diffusion_models": HERE / "model", "vae": HERE / "model", "custom_nodes": HERE / "packs"}
    print("starting ComfyUI", flush=True)
    try:
        # In float32 on GPUs as well, so that a difference is not one of rounding.
        with ComfyServer(work, model_paths=folders, extra_args=["--fp32-unet", "--fp32-vae"]) as server:
            results = {
                name: _sample(server, name, graphs, options.output) for name, graphs in _ways(options, prompts).items()
            }
            agree = _report(results, prompts, options.output)
            if options.stay:
                _stay(server, options.output)
            print("stopping ComfyUI and its workers", flush=True)
    except (ComfyError, ConnectionError, TimeoutError) as error:
        print(f"the demo failed: {error}\nComfyUI's log: {work / 'comfyui.log'}", file=sys.stderr)
        return 1
    return 0 if agree else 1


def _warn_of_words(prompts: Sequence[str]) -> None:
    known = {"a", *COLOURS, *THINGS, *split(" ".join([*PLACES.values(), *TIMES.values()]))}
    unknown = dict.fromkeys(word for prompt in prompts for word in split(prompt) if word not in known)
    if unknown:
        print(
            f"the model has not learned: {', '.join(unknown)}. It knows {', '.join(COLOURS)}; {', '.join(THINGS)}; "
            f"{', '.join(PLACES.values())}; {', '.join(TIMES.values())}"
        )


def _ways(options: argparse.Namespace, prompts: Sequence[str]) -> dict[str, list[Graph]]:
    """Return the graphs of each way of sampling, one per prompt."""
    job = Sampling(MODEL, width=SIZE, height=SIZE, image=True, cfg=3.0, seed=SEED, steps=options.steps)
    makers: dict[str, Callable[..., Graph]] = {
        "stock": drawing.stock,
        "sampler node": drawing.sampler_node,
        "drop-in": drawing.drop_in,
    }
    counts = {"stock": {}, "sampler node": {"workers": options.workers}, "drop-in": {"workers": options.workers}}
    return {
        name: [maker(job, prompt, VAE, name.replace(" ", "-"), **counts[name]) for prompt in prompts]
        for name, maker in makers.items()
    }


def _sample(server: ComfyServer, name: str, graphs: Sequence[Graph], output: Path) -> Result:
    """Run the graphs; first run one with another seed, so that the timed runs find the model loaded."""
    print(f"sampling: {name}", flush=True)
    warm_up = {key: dict(node, inputs=dict(node["inputs"])) for key, node in graphs[0].items()}
    warm_up["sample"]["inputs"]["noise_seed"] += 1
    server.run(warm_up, timeout=600)
    latents, pictures, seconds = [], [], []
    for number, graph in enumerate(graphs, start=1):
        with server.listen() as listener:
            prompt = server.submit(graph)
            first = _moment(listener, prompt, lambda value, _: value == 1)
            last = _moment(listener, prompt, lambda value, end: value == end)
            history = server.wait(prompt, timeout=600)
        seconds.append((last - first) / max(1, graph["sample"]["inputs"]["steps"] - 1))
        latents.append(load_file(server.output_files(history, "save")[0])["latent_tensor"])
        pictures.append(output / f"{name.replace(' ', '-')}-{number}.png")
        shutil.copyfile(server.output_files(history, "picture")[0], pictures[-1])
    return Result(latents, pictures, sum(seconds) / len(seconds))


def _moment(listener, prompt, matches) -> float:
    """Return when the sampler's progress first matched, in seconds of the monotonic clock."""

    def is_it(message) -> bool:
        data = getattr(message, "data", {})
        return (
            getattr(message, "type", "") == "progress"
            and data.get("prompt_id") == prompt
            and data.get("node") == "sample"
            and matches(data["value"], data["max"])
        )

    listener.wait_for(is_it, timeout=600)
    return time.monotonic()


def _report(results: dict[str, Result], prompts: Sequence[str], output: Path) -> bool:
    """Write the sheet and print the results. Return whether all agree with the stock nodes."""
    sheet = output / "sheet.png"
    write_sheet({name: result.pictures for name, result in results.items()}, prompts, sheet)
    print(f"\n{len(prompts)} pictures by each way, side by side: {sheet}")
    stock = results["stock"]
    print(f"{'stock:':<14} {stock.step_s:.3f} s per step")
    agree = True
    for name, result in results.items():
        if result is stock:
            continue
        difference = max(
            ((actual - expected).abs().max() / expected.std()).item()
            for actual, expected in zip(result.latents, stock.latents, strict=True)
        )
        within = difference <= TOLERANCE  # not where it is NaN
        agree = agree and within
        print(
            f"{name + ':':<14} {result.step_s:.3f} s per step   max difference: {difference:.1e} of the standard "
            f"deviation ({'within' if within else 'MORE THAN'} {TOLERANCE:.0e})"
        )
    return agree


def _stay(server: ComfyServer, output: Path) -> None:
    picture = (output / "drop-in-1.png").resolve()
    print(
        f"\nComfyUI stays at http://127.0.0.1:{server.port}: drop {picture} on it to open the graph of the drop-in "
        "MODEL, and type a prompt. Ctrl-C ends it.",
        flush=True,
    )
    try:
        while True:
            server.queue()
            time.sleep(1.0)
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("interrupted: ComfyUI and its workers are stopped", file=sys.stderr)
        sys.exit(130)
