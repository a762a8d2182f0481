"""Degrees that each run chooses, beside given ones and stock ComfyUI, through Ray, per step of a model at full size.

    COMFYUI_PATH=/my/ComfyUI python benchmarks/gpu/degrees.py --folder /dev/shm --ranks 2 4 --json degrees.json
    ... --size flux-1024 --layers 0 --kinds one --steps 9 --shardings replicated sharded --graphs auto off

Runs with CFG, without it, with two images, and with prompts of different lengths, which ComfyUI cannot put into one
batch. For each number of workers the ways share one session, whose workers take other degrees without a restart; a step
is the difference between a run of several steps and a run of one, after runs in which weights begin to stay gathered
and graphs are captured. `between` is the median time between the ends of two steps of one run, as workers report them.
`relative L2` is to stock's latent. With --advice, what Raylight Advice expects of these
workers and the file is printed beside what was measured. With --compile the model is compiled, by stock and by the
workers, as ComfyUI's TorchCompileModel does.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from full_size import SIZES, versions, write_checkpoint
from torch import Tensor

from raylight.host.recipe import OFFLOADED, REPLICATED, SHARDED
from raylight.parallel.graphs import AUTO, NAMES

BY_RUN = "by the run"
TEXT = "c_crossattn"


@dataclass(frozen=True)
class Kind:
    """A kind of run: its guidance scale, images, and whether the negative prompt is shorter than the other."""

    title: str
    cfg: float
    images: int = 1
    shorter: bool = False


KINDS = {
    "cfg": Kind("CFG 5", 5.0),
    "one": Kind("no CFG", 1.0),
    "images": Kind("no CFG, 2 images", 1.0, 2),
    "lengths": Kind("CFG 5, prompts of other lengths", 5.0, shorter=True),
}


class Chosen(logging.Handler):
    """Keeps what the driver logs of the degrees of a run."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("degrees: "):
            self.text = record.getMessage().removeprefix("degrees: ")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="wan-480p", choices=SIZES)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--layers", type=int, default=10, help="this many layers of each kind; 0: all")
    parser.add_argument("--steps", type=int, default=4, help="of the longer run")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--attention", default="TORCH_FLASH", help="TORCH_FLASH is what stock ComfyUI takes")
    parser.add_argument("--ways", nargs="+", help="only degrees of these names in the table")
    parser.add_argument("--shardings", nargs="+", default=[REPLICATED], choices=(REPLICATED, SHARDED, OFFLOADED))
    parser.add_argument("--graphs", nargs="+", default=[AUTO], choices=NAMES)
    parser.add_argument("--folder", type=Path, help="for the file of weights; a temporary one where it is not given")
    parser.add_argument("--advice", action="store_true")
    parser.add_argument("--compile", metavar="BACKEND", help="inductor or another backend of torch.compile")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def prompt(name: str, seed: int, shorter: bool = False) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    texts = dict(SIZES[name].texts)
    batch, tokens, width = texts[TEXT]
    if shorter:
        tokens -= tokens // 16 + 1
    more = {"pooled_output": torch.randn(texts["y"], generator=generator)} if "y" in texts else {}
    return [[torch.randn(batch, tokens, width, generator=generator), more]]


def sample(model: Any, name: str, kind: Kind, seed: int, steps: int) -> Tensor:
    import comfy.sample
    import comfy.samplers

    shape = (kind.images, *SIZES[name].latent[1:])
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    return comfy.sample.sample_custom(
        model,
        comfy.sample.prepare_noise(torch.zeros(shape), seed),
        kind.cfg,
        comfy.samplers.sampler_object("euler"),
        sigmas,
        prompt(name, 1),
        prompt(name, 2, kind.shorter),
        torch.zeros(shape),
        disable_pbar=True,
        seed=seed,
    )


def compiled(model: Any, backend: str | None) -> Any:
    """Return the model that TorchCompileModel gives, or the same one without a backend."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    if backend is None:
        return model
    model = model.clone()
    set_torch_compile_wrapper(model, backend=backend)
    return model


def timed(model: Any, name: str, kind: Kind, seed: int, steps: int) -> tuple[float, Tensor]:
    began = time.perf_counter()
    result = sample(model, name, kind, seed, steps).float().cpu()
    return time.perf_counter() - began, result


def measure(model: Any, name: str, kind: Kind, options: argparse.Namespace) -> tuple[float, Tensor]:
    """Return the seconds of a step, and the latent of a run whose seed is the same for every way."""
    # Loads, makes process groups and warms up; what weights that begin to stay gathered change is captured anew.
    for steps in (1, options.steps, options.steps):
        timed(model, name, kind, 0, steps)
    taken = []
    latent = torch.empty(0)
    for turn in range(options.repeats):
        once, _ = timed(model, name, kind, turn, 1)
        often, latent = timed(model, name, kind, turn, options.steps)
        taken.append((often - once) / (options.steps - 1))
    return statistics.median(taken), latent


def advice_for(model: Any, stock: Any, name: str) -> str:
    """Return what Raylight Advice says of a model at this size."""
    from raylight.driver.advice import advise

    latent, scale = SIZES[name].latent, stock.model.latent_format.spacial_downscale_ratio
    frames = 1 if len(latent) == 4 else 4 * (latent[2] - 1) + 1
    return advise(model, latent[-1] * scale, latent[-2] * scale, frames)


def meshes(ranks: int) -> dict[str, Any]:
    """Return the ways to arrange so many workers: by the run, and given degrees."""
    from raylight.parallel.mesh import MeshShape

    ways = {BY_RUN: None, f"ulysses {ranks}": MeshShape(ulysses=ranks)}
    if ranks % 2 == 0:
        rest = f" x ulysses {ranks // 2}" if ranks > 2 else ""
        ways[f"cfg 2{rest}"] = MeshShape(batch=2, ulysses=ranks // 2)
    return ways


@torch.inference_mode()
def main() -> None:
    options = parsed()
    import comfy.model_management
    import comfy.sd

    from raylight.cluster import active_session
    from raylight.cluster.config import SessionConfig
    from raylight.driver import api, step_times
    from raylight.host.recipe import ModelRecipe, RayModel, WorkerConfig
    from raylight.parallel.mesh import MeshShape

    chosen, log = Chosen(), logging.getLogger("raylight")
    log.setLevel(logging.INFO)
    log.addHandler(chosen)
    log.propagate = False  # a line for each run would hide the table
    name = options.size
    figures: dict[str, Any] = {"versions": versions(), "attention": options.attention, "layers": options.layers}
    print(figures["versions"])
    by = f", compiled by {options.compile}" if options.compile else ""
    print(f"{SIZES[name].title}, {options.layers or 'all'} layers, {options.attention}{by}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "model.safetensors"
        write_checkpoint(name, path, torch.device(options.device), options.layers or None)
        stock = compiled(comfy.sd.load_diffusion_model(str(path)), options.compile)
        expected = {key: measure(stock, name, KINDS[key], options) for key in options.kinds}
        comfy.model_management.unload_all_models()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"{'':<34} {'way':<34} {'s a step':>9} {'speed-up':>8} {'between':>8} {'relative L2':>11}  chosen")
        for key, (seconds, _) in expected.items():
            print(f"{KINDS[key].title:<34} {'stock, 1 GPU':<34} {seconds:>9.4f} {1:>8.2f}")
        for ranks in options.ranks:
            found = {way: mesh for way, mesh in meshes(ranks).items() if not options.ways or way in options.ways}
            for (way, mesh), sharding, graphs in product(found.items(), options.shardings, options.graphs):
                config = SessionConfig(mesh or MeshShape(ulysses=ranks), options.device, by_run=mesh is None)
                worker = WorkerConfig(config, options.attention, graphs=graphs)
                loaded = RayModel(worker, ModelRecipe.of(str(path), "default", sharding))
                model = compiled(api.load(loaded), options.compile)
                way = ", ".join([way, *[sharding] * (sharding != REPLICATED), *[f"graphs {graphs}"] * (graphs != AUTO)])
                for key in options.kinds:
                    chosen.text = ""
                    seconds, latent = measure(model, name, KINDS[key], options)
                    of_stock, other = expected[key]
                    error = ((latent - other).norm() / other.norm()).item()
                    between = step_times.last_runs(str(path))[0].seconds
                    print(
                        f"{KINDS[key].title:<34} {f'{ranks}: {way}':<34} {seconds:>9.4f} {of_stock / seconds:>8.2f} "
                        f"{between:>8.4f} {error:>11.1e}  {chosen.text}",
                        flush=True,
                    )
                    figures[f"{ranks} {way}, {key}"] = {
                        "seconds": seconds,
                        "of_stock": of_stock / seconds,
                        "between_steps": between,
                        "relative_l2": error,
                        "chosen": chosen.text,
                    }
                if options.advice:
                    print(advice_for(loaded, stock, name))
            active_session.close(keep_ray=True)
    active_session.close()
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
