"""GPU memory with replicated, sharded and offloaded weights, and how much of the copy from the host is hidden.

    COMFYUI_PATH=/my/ComfyUI python benchmarks/gpu/memory.py --layers 8 --json memory.json

All ranks use one GPU, over gloo: their memory is as on separate GPUs, but gloo, unlike NCCL, uses one block for a copy;
their times mean nothing. `weights` is the memory between forwards; `more` the peak in a forward beyond that; `in
blocks` is `more` less that of replicated weights on as many ranks, which is the memory of gathering.

Offloading is timed with one rank on NCCL: `hidden` is the share of the copy that no forward waits for.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from full_size import SIZES, RandomWeights, fill, inputs, skeleton, versions
from measure import between, mark, synchronize

from raylight.dev.local_ranks import run_ranks, values

REPLICATED, SHARDED, OFFLOADED = "replicated", "sharded", "sharded, offloaded"


def device_of(device_type: str) -> torch.device:
    if device_type == "cuda":
        torch.cuda.set_device(0)
        return torch.device("cuda", 0)
    return torch.device("cpu")


def model_on(name: str, layers: int | None, weights_are: str, device: torch.device) -> tuple[Any, dict, int]:
    """Return the model with its tokens split over all ranks and its weights placed as `weights_are` says, the options
    to call it with, and the bytes of a block.
    """
    import torch.distributed as dist

    from raylight.attention.kernels import kernel
    from raylight.parallel.mesh import MeshShape, build_mesh, world_axis
    from raylight.plans import plan_for
    from raylight.sharding.fsdp import shard, units
    from raylight.worker.sequence_parallel import apply_sequence_parallel

    mesh = build_mesh(MeshShape(ulysses=dist.get_world_size()), device)
    model = skeleton(name, layers)
    block = sum(p.nbytes for p in next(iter(units(model.diffusion_model).values())).parameters())
    options: dict[str, Any] = {}
    split = apply_sequence_parallel(model.diffusion_model, plan_for(model.diffusion_model), mesh)
    split.install(options, kernel("auto", device))
    weights = RandomWeights(model.diffusion_model, device)
    if weights_are == REPLICATED:
        fill(model.diffusion_model, weights, device)
    else:
        shard(model.diffusion_model, weights, world_axis(mesh), device, weights_are == OFFLOADED)
    return model, options["transformer_options"], block


def peak(rank: int, world: int, name: str, layers: int | None, weights_are: str, device_type: str) -> dict[str, float]:
    """Return one rank's bytes of weights between forwards, of its peak beyond these, and of a block."""
    device = device_of(device_type)
    with torch.no_grad():
        model, options, block = model_on(name, layers, weights_are, device)
        given = inputs(name, device)
        synchronize(device)
        if device.type == "cpu":
            model.apply_model(**given, transformer_options=dict(options))
            return {"weights": 0.0, "more": 0.0, "block": block}
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model.apply_model(**given, transformer_options=dict(options))
        synchronize(device)
        return {"weights": before, "more": torch.cuda.max_memory_allocated() - before, "block": block}


def offloading(rank: int, world: int, name: str, layers: int | None, repeats: int, device_type: str) -> dict[str, Any]:
    """Return the seconds of a forward with replicated, sharded and offloaded weights of one rank, and of copying."""
    device = device_of(device_type)
    found: dict[str, Any] = {}
    with torch.no_grad():
        given = inputs(name, device)
        for weights_are in (REPLICATED, SHARDED, OFFLOADED):
            model, options, _ = model_on(name, layers, weights_are, device)
            taken = []
            for _ in range(repeats + 1):
                start = mark(device)
                model.apply_model(**given, transformer_options=dict(options))
                end = mark(device)
                synchronize(device)
                taken.append(between(start, end))
            found[weights_are] = statistics.median(taken[1:])
            if weights_are == OFFLOADED:
                found["copy"] = copying(model, device)
            del model
            if device.type == "cuda":
                torch.cuda.empty_cache()
    waited = max(0.0, found[OFFLOADED] - found[SHARDED])
    found["hidden"] = 1 - waited / found["copy"]
    return found


def copying(model: Any, device: torch.device) -> float:
    """Return the seconds to copy all shards from the host, one after another, and nothing else."""
    from torch.distributed.tensor import DTensor

    shards = [p.to_local() for p in model.diffusion_model.parameters() if isinstance(p, DTensor)]
    synchronize(device)
    start = mark(device)
    for one in shards:
        one.to(device, non_blocking=True)
    end = mark(device)
    synchronize(device)
    return between(start, end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="wan-480p", choices=SIZES)
    parser.add_argument("--layers", type=int, help="this many layers of each kind instead of all")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures: dict[str, Any] = {"versions": versions(), "layers": options.layers}
    print(figures["versions"])
    shortened = "" if options.layers is None else f", {options.layers} layers of each kind"
    print(
        f"{SIZES[options.size].title}{shortened}, bfloat16, tokens split over the ranks; GB of one rank\n"
        f"{'ranks':>5} {'weights are':<18} {'weights':>8} {'more':>8} {'sum':>8} {'in blocks':>9}"
    )
    for world in options.ranks:
        replicated = 0.0
        for weights_are in (REPLICATED, SHARDED, OFFLOADED):
            if world == 1 and weights_are != REPLICATED:
                continue
            ranks = values(
                run_ranks(
                    world,
                    peak,
                    options.size,
                    options.layers,
                    weights_are,
                    options.device,
                    timeout_s=300,
                    collective_timeout_s=200,
                )
            )
            most = max(ranks, key=lambda one: one["weights"] + one["more"])
            replicated = replicated or most["more"]
            blocks = f"{(most['more'] - replicated) / most['block']:9.2f}" if weights_are != REPLICATED else ""
            print(
                f"{world:>5} {weights_are:<18} {most['weights'] / 1e9:8.2f} {most['more'] / 1e9:8.2f} "
                f"{(most['weights'] + most['more']) / 1e9:8.2f} {blocks}",
                flush=True,
            )
            figures[f"{world} ranks, {weights_are}"] = most
    found = values(
        run_ranks(
            1,
            offloading,
            options.size,
            options.layers,
            options.repeats,
            options.device,
            timeout_s=300,
            device_type=options.device,
        )
    )[0]
    print(
        f"\none rank, seconds of a forward: replicated {found[REPLICATED]:.3f}, sharded {found[SHARDED]:.3f}, "
        f"offloaded {found[OFFLOADED]:.3f}; copying {found['copy']:.3f}, of which {found['hidden']:.1%} is hidden"
    )
    figures["offloading"] = found
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
