"""Memory on a GPU over many runs, and after a run that does not fit.

One worker on the GPU, a small Wan at 480x832 with 33 frames: 50 runs, with the memory of the device and of both
processes after each; then the device is almost filled, so that a run fails in the worker; then, with that memory freed,
the first run again. Exits with 1 if memory grows by 1 % or more after the fifth run, if the failure is not reported as
out of memory, or if the last run differs from the first by more than a relative L2 of 1e-2.

    COMFYUI_PATH=/my/ComfyUI python benchmarks/gpu/endurance.py
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [os.environ["COMFYUI_PATH"]]
sys.path.append(str(ROOT))

PARSER = argparse.ArgumentParser(description=__doc__.splitlines()[0])
PARSER.add_argument("--runs", type=int, default=50)
PARSER.add_argument("--left-mib", type=int, default=600, help="free memory for the run that must fail")
OPTIONS = PARSER.parse_args()

import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher

from raylight.cluster import active_session
from raylight.cluster.config import SessionConfig
from raylight.cluster.errors import OUT_OF_MEMORY, WorkerError
from raylight.dev.demo.prompts import random_prompt
from raylight.dev.demo.tiny import write_checkpoint
from raylight.driver import api
from raylight.host.recipe import ModelRecipe, RayModel, WorkerConfig
from raylight.host.worker_service import WorkerService
from raylight.parallel.mesh import MeshShape

SHAPE, LARGE = (1, 16, 9, 60, 104), (1, 16, 41, 120, 208)


def sample(model: ModelPatcher, seed: int, shape: tuple[int, ...], prompts: list) -> torch.Tensor:
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 2)
    latent = torch.zeros(shape)
    noise, euler = comfy.sample.prepare_noise(latent, seed), comfy.samplers.sampler_object("euler")
    return (
        comfy.sample.sample_custom(model, noise, 4.0, euler, sigmas, *prompts, latent, disable_pbar=True, seed=seed)
        .float()
        .cpu()
    )


def taken() -> dict[str, int]:
    """Return the bytes used of the device by all programs, and of system memory by this process and by the worker.

    Ray's object store is not included: it is shared memory of a fixed size.
    """
    free, total = torch.cuda.mem_get_info()
    return {
        "device": total - free,
        "ComfyUI": anonymous_bytes(os.getpid()),
        "worker": anonymous_bytes(active_session.running().places[0].pid),
    }


def anonymous_bytes(pid: int) -> int:
    """Return the bytes of a process that are in no file and no other process, as Linux reports them."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


@torch.inference_mode()
def main() -> int:
    prompts = [random_prompt(512, 4096, seed) for seed in (1, 2)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "wan.safetensors"
        write_checkpoint(path, "wan-t2v", heads=12, layers=4)
        workers = WorkerConfig(SessionConfig(MeshShape(), "cuda"), "auto")
        model = api.load(RayModel(workers, ModelRecipe.of(str(path), "bf16")))
        first, history = None, []
        for seed in range(OPTIONS.runs):
            result = sample(model, seed, SHAPE, prompts)
            first = result if first is None else first
            history.append(taken())
        grown = _report(history)
        failed = _fail(model, prompts)
        again = sample(model, 0, SHAPE, prompts)
        difference = ((again - first).norm() / first.norm()).item()
        print(f"after that, the first run again: relative L2 {difference:.1e}")
        active_session.close()
    return int(grown or not failed or difference > 1e-2)


def _report(history: list[dict[str, int]]) -> bool:
    grown = False
    for name in history[0]:
        series = [of_run[name] for of_run in history]
        settled, last = max(series[5:10]), max(series[-5:])
        grown |= last >= 1.01 * settled
        print(
            f"{name:<8} after run 1, 6, {len(series)}: {series[0] / 1e6:.1f} {series[5] / 1e6:.1f} "
            f"{series[-1] / 1e6:.1f} MB; growth after the fifth {100 * (last / settled - 1):+.2f} %"
        )
    return grown


def _fail(model: ModelPatcher, prompts: list) -> bool:
    """Fill the device, and return whether a run then fails with an error of memory."""
    active_session.running().run(WorkerService.free)
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(free - (OPTIONS.left_mib << 20), dtype=torch.uint8, device="cuda")
    try:
        sample(model, 0, LARGE, prompts)
    except WorkerError as error:
        print(f"the run that does not fit: {error}")
        return error.kind == OUT_OF_MEMORY
    finally:
        del ballast
        torch.cuda.empty_cache()
    print("the run that should not fit did")
    return False


if __name__ == "__main__":
    sys.exit(main())
