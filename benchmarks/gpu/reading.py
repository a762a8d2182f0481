"""Whole weights from a file to several GPUs: by each for itself, and together over the link.

    COMFYUI_PATH=/my/ComfyUI python benchmarks/gpu/reading.py --folder /dev/shm --ranks 2 4

The model has random weights in bfloat16, which ComfyUI computes in float16. The rate is the file's size over the time
until it is on all GPUs. `first` includes what NCCL and the buffers take at first; `cold` (only with a folder on a disk)
is with the file out of the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from full_size import SIZES, versions, write_checkpoint

from raylight.dev.local_ranks import run_ranks, values


def measure(rank: int, world: int, path: str, ways: tuple[str, ...], repeats: int) -> dict[str, float]:
    """Return the seconds of the loads in some ways, from when all ranks begin until all have it, and the slowest link.
    The least of `repeats` counts besides the first one.
    """
    from raylight.host.checkpoint import load_mapped
    from raylight.parallel import bandwidth
    from raylight.worker.patcher import mode_of
    from raylight.worker.replicated_patcher import build_replicated

    device, found = torch.device("cuda", rank), {}
    links = bandwidth.measure(device)
    if world > 1:
        found["link, GB/s"] = min(links.bytes_per_s.values()) / 1e9
    with mode_of("replicated"):
        patcher, _ = build_replicated(load_mapped(path, {}), torch.device("cpu"), in_file=True)

        def seconds() -> float:
            torch.cuda.synchronize()
            dist.barrier()
            began = time.perf_counter()
            patcher.partially_load(device, 10**15)
            torch.cuda.synchronize()
            dist.barrier()
            taken = time.perf_counter() - began
            patcher.detach()
            return taken

        for way in ways:
            bandwidth.use(links if way == "together" else None)
            found[f"{way}, first"] = seconds()
            if repeats:
                found[way] = min(seconds() for _ in range(repeats))
    return found


def cold(ranks: int, path: str) -> dict[str, float]:
    """Measure each way with a file that is only on its disk: in new processes, as mapped pages stay in memory."""
    found = {}
    for way in ("alone", "together"):
        forget(path)
        taken = values(run_ranks(ranks, measure, path, (way,), 0, timeout_s=400, device_type="cuda"))[0]
        found[f"{way}, cold"] = taken[f"{way}, first"]
    return found


def forget(path: str) -> None:
    """Drop a file's pages from the page cache."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="wan-480p", choices=SIZES)
    parser.add_argument("--layers", type=int, help="this many layers of each kind instead of all")
    parser.add_argument("--ranks", type=int, nargs="+", help="numbers of GPUs; 1, 2 and 4 where there are as many")
    parser.add_argument("--folder", type=Path, help="for the file of weights; a temporary one where it is not given")
    parser.add_argument("--cold", action="store_true", help="also with the file out of the page cache")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    counts = options.ranks or [count for count in (1, 2, 4) if count <= torch.cuda.device_count()]
    print(versions())
    figures = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "model.safetensors"
        size = write_checkpoint(options.size, path, torch.device("cuda"), options.layers)
        torch.cuda.empty_cache()
        print(f"{SIZES[options.size].title}, a file of {size / 1e9:.1f} GB")
        for ranks in counts:
            ways = ("alone", "together") if ranks > 1 else ("alone",)
            found = values(run_ranks(ranks, measure, str(path), ways, 2, timeout_s=400, device_type="cuda"))[0]
            if options.cold and ranks > 1:
                found |= cold(ranks, str(path))
            figures[ranks] = found
            link = found.pop("link, GB/s", 0.0)
            print(f"{ranks} GPUs" + f", slowest link {link:.0f} GB/s" * (ranks > 1))
            for name, taken in found.items():
                print(f"    {name:<16} {taken:7.2f} s {size / taken / 1e9:8.1f} GB/s", flush=True)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
