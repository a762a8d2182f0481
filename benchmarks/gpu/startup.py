"""Start of workers, load of a model at full size, its memory in the system, and what brings workers back.

    COMFYUI_PATH=/my/ComfyUI python benchmarks/gpu/startup.py --folder /dev/shm --json startup.json

The model has random weights in bfloat16, which ComfyUI computes in float16; its file (28 GB for Wan 14B) is written to
--folder and stays in memory. Each way has a ComfyUI process of its own, without other nodes, and is measured from the
moment at which ComfyUI would run the first node:

    stock       ComfyUI's loader and one step on one GPU
    start       workers ready, from nothing, with the import of Ray
    first       start, load, and the first step
    again       another run of one step: the model is loaded
    back        a run of one step after the model has left the GPU
    degrees     other degrees among the same GPUs (two batch groups), until the workers are ready for a run
    killed      a run of one step after a rank was killed, from the next prompt on
    Ray up      workers ready where Ray runs already

With each start, what of it had ended when: in ComfyUI's process, and in the worker that was the last.

Memory is that of all workers beyond workers that have done nothing yet, over the file's size, by the kernel's kinds
(proportional set size): anonymous, shared memory, and pages of files; `pinned` is what the CUDA driver has pinned and
these kinds do not show, taken from what the machine cannot reclaim. What is there without the model is not due to its
weights: libraries that the first step has loaded.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from full_size import SIZES, versions, write_checkpoint
from overhead import STOCK, sample

from raylight.cluster.timeline import StartTimes

WAYS = ("replicated", "sharded", "offloaded")
KINDS = {"anonymous": "Pss_Anon", "shared": "Pss_Shmem", "file pages": "Pss_File"}
KILLED_S = 30  # until the end of a rank is noticed
COLUMNS = ("start", "first", "again", "back", "degrees", "killed", "Ray up")
GOALS = {"start": 8, "Ray up": 4, "first": 15, "first, sharded": 12, "degrees": 2, "killed": 10, "anonymous": 0.05}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="wan-480p", choices=SIZES)
    parser.add_argument("--layers", type=int, help="this many layers of each kind instead of all")
    parser.add_argument("--ranks", type=int, nargs="+", help="numbers of workers; 2 and 4 where there are as many GPUs")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--folder", type=Path, help="for the file of weights; a temporary one where it is not given")
    parser.add_argument("--only-start", action="store_true", help="the start of workers alone, without a model")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=3, metavar=("RANKS", "WAY", "FILE"), help=argparse.SUPPRESS)
    return parser.parse_args()


class Memory:
    """System memory of some processes and of the machine, in bytes, beyond what it was at first."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self._first = self._now()

    def beyond(self) -> dict[str, int]:
        """Return the growth by kind."""
        now = {kind: count - self._first[kind] for kind, count in self._now().items()}
        # The kernel's kinds leave out what the CUDA driver pins.
        now["pinned"] = max(0, now.pop("machine") - now["anonymous"])
        return now

    def _now(self) -> dict[str, int]:
        found = dict.fromkeys(KINDS, 0)
        for pid in self._pids:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            of_process = {
                name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines[1:])
            }
            for kind, name in KINDS.items():
                found[kind] += of_process[name]
        machine = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in open("/proc/meminfo")}
        # Shared memory is left out: pages of a file in /dev/shm count there when a process maps them.
        found["machine"] = machine["MemTotal"] - machine["MemFree"] - machine["Buffers"] - machine["Cached"]
        return found


def seconds_of(call: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def stock(path: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure ComfyUI's own load and first step, and the next run."""
    import comfy.sd

    def first() -> Any:
        model = comfy.sd.load_diffusion_model(path)
        sample(model, STOCK, options.size, 0, 1)
        return model

    taken, model = seconds_of(first)
    return {"first": taken, "again": seconds_of(lambda: sample(model, STOCK, options.size, 1, 1))[0]}


def workers(ranks: int, way: str, path: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure `ranks` workers, from nothing to their end."""
    began = time.perf_counter()
    from raylight.cluster import active_session
    from raylight.cluster.config import SessionConfig
    from raylight.driver import api
    from raylight.driver.workers import open_session
    from raylight.host import recipe
    from raylight.host.recipe import ModelRecipe, RayModel, WorkerConfig
    from raylight.host.worker_service import WorkerService
    from raylight.parallel.mesh import MeshShape

    sharding = getattr(recipe, way.upper())
    usual = WorkerConfig(SessionConfig(MeshShape(ulysses=ranks), options.device), "auto", sharding=sharding)
    seeds = iter(range(1000))

    def prompt(config: WorkerConfig) -> Any:
        """Do what a prompt does: a loader, and a sampler with one step."""
        model = api.load(RayModel(config, ModelRecipe.of(path, "default", sharding)))
        return sample(model, STOCK, options.size, next(seeds), 1)

    found: dict[str, Any] = {}
    session = open_session(usual)
    found["start"] = time.perf_counter() - began
    found["times"] = {"start": asdict(session.times)}
    memory = Memory([place.pid for place in session.places.values()])
    prompt(usual)
    found["first"] = time.perf_counter() - began
    found["memory"] = {"loaded": memory.beyond()}
    found["again"], _ = seconds_of(lambda: prompt(usual))
    prompt(replace(usual, free_memory_after=True))
    found["memory"]["left the GPU"] = memory.beyond()
    found["back"], _ = seconds_of(lambda: prompt(usual))
    found["memory"]["back"] = memory.beyond()
    if ranks % 2 == 0:
        other = replace(usual, config=replace(usual.config, mesh=MeshShape(batch=2, ulysses=ranks // 2)))
        recipe_of_file = ModelRecipe.of(path, "default", sharding)
        found["degrees"], _ = seconds_of(lambda: api.load(RayModel(other, recipe_of_file)))
        found["first after degrees"], _ = seconds_of(lambda: prompt(other))
    open_session(other if ranks % 2 == 0 else usual).run(WorkerService.free)
    found["memory"]["without the model"] = memory.beyond()
    os.kill(open_session(other if ranks % 2 == 0 else usual).places[ranks - 1].pid, signal.SIGKILL)
    time.sleep(1)  # a person takes longer to queue another prompt

    def until_done() -> None:
        try:
            prompt(usual)
        except Exception as error:  # the prompt that finds the rank gone
            print(f"  {type(error).__name__}: {error}", file=sys.stderr)
            prompt(usual)

    found["killed"], _ = seconds_of(until_done)
    found["Ray up"], found["times"]["Ray up"] = ray_up(usual)
    active_session.close()
    return found


def starts(ranks: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure starts of `ranks` workers alone: the first, one after a rank was killed, and one where Ray runs."""
    began = time.perf_counter()
    from raylight.cluster import active_session
    from raylight.cluster.config import SessionConfig
    from raylight.driver.workers import open_session
    from raylight.host.recipe import WorkerConfig
    from raylight.parallel.mesh import MeshShape

    found: dict[str, Any] = {"imports of Ray and Raylight": time.perf_counter() - began}
    usual = WorkerConfig(SessionConfig(MeshShape(ulysses=ranks), options.device), "auto")
    session = open_session(usual)
    found["start"] = time.perf_counter() - began
    found["times"] = {"start": asdict(session.times)}
    os.kill(session.places[ranks - 1].pid, signal.SIGKILL)
    deadline = time.monotonic() + KILLED_S
    while session.alive and time.monotonic() < deadline:
        time.sleep(0.05)
    found["killed"], session = seconds_of(lambda: open_session(usual))
    found["times"]["killed"] = asdict(session.times)
    found["Ray up"], found["times"]["Ray up"] = ray_up(usual)
    active_session.close()
    return found


def ray_up(workers: Any) -> tuple[float, dict[str, Any]]:
    """End the workers and start others in the same Ray. Return the seconds, and the times of the start."""
    from raylight.driver import api
    from raylight.driver.workers import open_session

    api.end_workers(with_ray=False)
    seconds, session = seconds_of(lambda: open_session(workers))
    return seconds, asdict(session.times)


def one(ranks: str, way: str, path: str, options: argparse.Namespace) -> None:
    """Measure one way in this process, and print its figures."""
    logging.basicConfig(format="  %(levelname)s %(name)s: %(message)s")
    logging.getLogger("raylight.cluster.ray_runtime").setLevel(logging.INFO)  # why workers are not forked
    import comfy.model_management
    import comfy.sample
    import comfy.sd  # noqa: F401  # as ComfyUI has imported it when it runs a node

    with torch.inference_mode():
        if not path:
            found = starts(int(ranks), options)
        else:
            found = stock(path, options) if ranks == "0" else workers(int(ranks), way, path, options)
    print("figures", json.dumps(found))


def measured(ranks: int, way: str, path: Path | str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one way in a process of its own; without a file only starts."""
    command = [sys.executable, __file__, "--size", options.size, "--device", options.device]
    process = subprocess.run(
        [*command, "--one", str(ranks), way, str(path)], stdout=subprocess.PIPE, text=True, check=True
    )
    return next(json.loads(line.split(" ", 1)[1]) for line in process.stdout.splitlines() if line.startswith("figures"))


def print_times(found: dict[str, Any]) -> None:
    for what, times in found["times"].items():
        print(f"    {what}: {StartTimes(**times)}", flush=True)


def only_starts(counts: list[int], options: argparse.Namespace) -> None:
    """Print starts without a model, with all that was imported for forks."""
    figures = {}
    for ranks in counts:
        found = figures[f"{ranks} workers"] = measured(ranks, "replicated", "", options)
        print(f"{ranks} workers: " + ", ".join(f"{key} {found[key]:.2f}" for key in found if key != "times"))
        print_times(found)
        longest = sorted(found["times"]["start"]["imports"].items(), key=lambda item: -item[1])
        print("    imported for forks: " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in longest[:8]))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


def main() -> None:
    options = parsed()
    if options.one:
        one(*options.one, options)
        return
    gpus = torch.cuda.device_count() if options.device == "cuda" else 2
    counts = options.ranks or [count for count in (2, 4) if count <= gpus] or [1]
    figures: dict[str, Any] = {"versions": versions()}
    print(figures["versions"])
    if options.only_start:
        only_starts(counts, options)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "model.safetensors"
        size = write_checkpoint(options.size, path, torch.device(options.device), options.layers)
        print(f"{SIZES[options.size].title}, a file of {size / 1e9:.1f} GB. Seconds:")
        reference = measured(0, "stock", path, options)
        figures["stock"] = reference
        print(f"{'stock ComfyUI, 1 GPU':<24}{'':>8}" + "".join(f"{reference[key]:>8.2f}" for key in ("first", "again")))
        print(f"{'':<24}" + "".join(f"{column:>8}" for column in COLUMNS) + f"{'/ stock':>9}")
        for ranks in counts:
            for way in options.ways:
                found = measured(ranks, way, path, options)
                figures[f"{ranks} {way}"] = found
                cells = "".join(f"{found[column]:>8.2f}" if column in found else f"{'':>8}" for column in COLUMNS)
                print(f"{f'{ranks} {way}':<24}{cells}{found['first'] / reference['first']:>8.2f}x")
                print_times(found)
                for when, kinds in found["memory"].items():
                    cells = ", ".join(f"{kind} {count / size:.3f}" for kind, count in kinds.items())
                    print(f"    {when + ':':<20} {cells} of the file", flush=True)
                if options.json:
                    options.json.write_text(json.dumps(figures, indent=1))
    print(f"Goals for Wan 14B on 4 H100: {GOALS}")


if __name__ == "__main__":
    main()
