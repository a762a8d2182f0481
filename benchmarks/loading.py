"""Time and system memory of loading a large checkpoint on 1, 2 and 4 workers, against stock ComfyUI.

The checkpoint is generated: as many blocks of Wan 14B as make up the size, in bf16, and in scaled fp8 with the rest in
float32, in which ComfyUI computes on the CPU. Everything runs on the CPU, with shards in host memory and the file in
the page cache; set-ups take turns, and medians are compared.

    COMFYUI_PATH=/my/ComfyUI python benchmarks/loading.py --gib 6

Memory is the proportional set size (PSS) of the workers' processes, in which a page of several processes counts once,
beyond what they had before the load. `peak` excludes pages of the file, which the machine can reclaim at any time. A
load only maps replicated weights: `after a step` is the memory after one denoising step, which reads them.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing as mp
import os
import statistics
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [os.environ["COMFYUI_PATH"]]
sys.path.append(str(ROOT))

from comfy.cli_args import args as comfy_args

comfy_args.cpu = True  # before ComfyUI's modules choose a device

HEADS, HEAD_WIDTH = 40, 128
TEXT_WIDTH = 4096
LATENT = (1, 16, 1, 8, 8)
FORMS = ("bf16", "scaled fp8")


@dataclass(frozen=True)
class Row:
    """One load. Memory in bytes; `own` is the weights' part of rank 0's own memory."""

    seconds: float
    grown: int
    peak: int
    stepped: int
    own: int


def write_checkpoint(path: Path, size: int, scaled_fp8: bool) -> None:
    """Write blocks of Wan 14B until the file has `size` bytes."""
    import comfy.ldm.wan.model
    import comfy.ops
    import torch

    pool = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * (HEADS * HEAD_WIDTH) ** -0.5
    scaled, plain = (pool * 64).to(torch.float8_e4m3fn), pool if scaled_fp8 else pool.bfloat16()
    sources = {"F8_E4M3": scaled, "F32": plain} if scaled_fp8 else {"BF16": plain}
    data = {dtype: source.view(torch.uint8).numpy().tobytes() for dtype, source in sources.items()}

    def entries(layers: int) -> list[tuple[str, str, list[int], int]]:
        """Return name, dtype, shape and bytes of every tensor."""
        model = comfy.ldm.wan.model.WanModel(
            model_type="t2v",
            in_dim=16,
            out_dim=16,
            dim=HEADS * HEAD_WIDTH,
            ffn_dim=13824,
            freq_dim=256,
            text_dim=TEXT_WIDTH,
            num_heads=HEADS,
            num_layers=layers,
            dtype=torch.bfloat16,
            device="meta",
            operations=comfy.ops.disable_weight_init,
        )
        found = []
        for name, parameter in model.state_dict().items():
            fp8 = scaled_fp8 and parameter.ndim == 2 and "blocks." in name
            dtype = "F8_E4M3" if fp8 else next(key for key in sources if key != "F8_E4M3")
            found.append((name, dtype, list(parameter.shape), parameter.numel() * sources[dtype].itemsize))
            if fp8:
                found.append((name.removesuffix("weight") + "scale_weight", "F32", [], 4))
        return found + ([("scaled_fp8", "F8_E4M3", [2], 2)] if scaled_fp8 else [])

    sizes = [sum(entry[3] for entry in entries(layers)) for layers in (1, 2)]
    chosen = entries(1 + max(0, -(-(size - sizes[0]) // (sizes[1] - sizes[0]))))
    header, offset = {}, 0
    for name, dtype, shape, count in chosen:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + count]}
        offset += count
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, dtype, _, count in chosen:
            if name.endswith("scale_weight"):
                file.write(struct.pack("<f", 1 / 64))
                continue
            while count > 0:
                count -= file.write(data[dtype][:count])


class Memory:
    """Sampler of the PSS of processes, beyond what it was before, and of its peak."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self._before = self._pss()
        self._anonymous_before = self._pss("Pss_Anon:")
        self.peak = 0
        self._stop = threading.Event()

    def __enter__(self) -> Memory:
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    def grown(self) -> int:
        return self._pss() - self._before

    def _sample(self) -> None:
        while not self._stop.wait(0.1):
            self.peak = max(self.peak, self._pss("Pss_Anon:") - self._anonymous_before)

    def _pss(self, line: str = "Pss:") -> int:
        total = 0
        for pid in self._pids:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += next(int(found.split()[1]) for found in lines if found.startswith(line)) * 1024
        return total


def stock(path: Path, _: bool) -> Row:
    """Measure ComfyUI's own loader, in a separate process."""
    context = mp.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_stock, args=(str(path), results))
    process.start()
    row = results.get()
    process.join()
    return row


def _stock(path: str, results: Any) -> None:
    import comfy.model_management
    import comfy.sd
    import torch

    with torch.inference_mode(), Memory([os.getpid()]) as memory:
        began = time.perf_counter()
        patcher = comfy.sd.load_diffusion_model(path, model_options={"dtype": torch.bfloat16})
        comfy.model_management.load_models_gpu([patcher])
        seconds = time.perf_counter() - began
        grown = memory.grown()
    results.put(Row(seconds, grown, memory.peak, 0, 0))


def workers(path: Path, ranks: int, sharding: str, step: bool) -> Row:
    """Measure `ranks` workers of a new session, which also do one step if asked to."""
    import comfy.sample
    import torch

    from raylight.cluster import active_session
    from raylight.cluster.config import SessionConfig
    from raylight.dev.demo.prompts import random_prompt
    from raylight.driver import api, workers
    from raylight.host.recipe import ModelRecipe, RayModel, WorkerConfig
    from raylight.host.worker_service import WorkerService
    from raylight.parallel.mesh import MeshShape

    config = SessionConfig(MeshShape(ulysses=ranks), "cpu")
    model = RayModel(WorkerConfig(config, "TORCH"), ModelRecipe.of(str(path), "bf16", sharding))
    session = active_session.session(config, workers.service_spec(config))
    try:
        with Memory([place.pid for place in session.places.values()]) as memory:
            began = time.perf_counter()
            patcher = api.load(model)
            seconds = time.perf_counter() - began
            grown = memory.grown()
        if step:
            prompt = random_prompt(8, TEXT_WIDTH, 1)
            latent = torch.zeros(LATENT)
            comfy.sample.sample(
                patcher,
                comfy.sample.prepare_noise(latent, 1),
                1,
                1.0,
                "euler",
                "simple",
                prompt,
                prompt,
                latent,
                disable_pbar=True,
                seed=1,
            )
        return Row(seconds, grown, memory.peak, memory.grown(), session.run(WorkerService.memory).models[0].host_bytes)
    finally:
        active_session.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=6.0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to put the checkpoints, and find those of a run before")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        figures = {
            form: _measure(folder / f"{form.replace(' ', '-')}-{options.gib}.safetensors", form, options)
            for form in options.forms
        }
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


def _measure(path: Path, form: str, options: argparse.Namespace) -> dict[str, Any]:
    from raylight.host.recipe import REPLICATED, SHARDED

    if not path.exists():
        write_checkpoint(path, int(options.gib * 2**30), form == "scaled fp8")
    size = path.stat().st_size
    with path.open("rb") as file:  # into the page cache
        while file.read(1 << 24):
            pass
    setups: dict[str, tuple[int, Callable[[bool], Row]]] = {"stock ComfyUI": (1, functools.partial(stock, path))}
    for sharding in (REPLICATED, SHARDED):
        for ranks in options.ranks:
            name = f"{ranks} worker{'s' * (ranks > 1)}{', FSDP' * (sharding == SHARDED)}"
            setups[name] = ranks, functools.partial(workers, path, ranks, sharding)
    rows: dict[str, list[Row]] = {name: [] for name in setups}
    for repeat in range(options.repeats):
        for name, (_, run) in setups.items():
            rows[name].append(run(repeat == 0 and not name.endswith("FSDP")))
    medians = {
        name: Row(*(statistics.median(getattr(row, field.name) for row in of_name) for field in fields(Row)))
        for name, of_name in rows.items()
    }
    base = medians["stock ComfyUI"].seconds
    print(f"\n{form}, {size / 2**30:.2f} GiB, {options.repeats} loads each, medians")
    print(
        f"{'':<20} {'seconds':>8} {'/ stock':>8} {'PSS / file':>11} {'peak':>6} {'after a step':>13} "
        f"{'shard / (file / N)':>19}"
    )
    for name, row in medians.items():
        is_sharded = name.endswith("FSDP")
        stepped = f"{rows[name][0].stepped / size:13.3f}" if "worker" in name and not is_sharded else " " * 13
        shard = f"{row.own / (size / setups[name][0]):19.3f}" if is_sharded else " " * 19
        print(
            f"{name:<20} {row.seconds:8.2f} {row.seconds / base:8.2f} {row.grown / size:11.3f} "
            f"{row.peak / size:6.2f} {stepped} {shard}"
        )
    return {"file_bytes": size, "medians": {name: asdict(row) for name, row in medians.items()}}


if __name__ == "__main__":
    main()
