"""Attention backends on one rank, under Ulysses and in a ring: their errors, and seconds of a step of Wan 14B.

    COMFYUI_PATH=/my/ComfyUI python benchmarks/gpu/split_attention.py --ranks 2 --names TORCH_FLASH auto FA SAGE_AUTO

`error` is the relative L2 to reference attention in float32, over some queries of some heads; `step` is one forward of
the model, and `L2` its difference from the step on one rank with the first of the names. A backend without a
log-sum-exp has no ring. What is not installed, or does not work on this GPU, is listed with the reason. With
--share-gpu all ranks are on one GPU and exchange over gloo, rings staged through the CPU: errors are the same then, and
times of several ranks mean nothing. With --device cpu, this is to try the program.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from full_size import SIZES, RandomWeights, fill, inputs, skeleton, versions
from measure import median, relative
from staged_ring import StagedThroughCpuHybrid
from torch import Tensor

from raylight.dev.local_ranks import run_ranks, values

HEADS, WIDTH = 40, 128
SOME_HEADS, SOME_QUERIES = 2, 512


@dataclass(frozen=True)
class Way:
    """Degrees of the mesh."""

    title: str
    ulysses: int = 1
    ring: int = 1


@dataclass(frozen=True)
class Setting:
    """What every rank runs."""

    names: tuple[str, ...]
    size: str
    layers: int
    tokens: int
    repeats: int
    device_type: str
    shared_gpu: bool


def measure(rank: int, world: int, way: Way, setting: Setting) -> dict[str, Any]:
    """Return what each backend gave on this rank, or why it cannot be used so."""
    from raylight.attention.kernels import check_kernel, kernel
    from raylight.parallel import bandwidth
    from raylight.parallel.mesh import MeshShape, build_mesh
    from raylight.parallel.ring import HybridAttention
    from raylight.plans import plan_for
    from raylight.worker.sequence_parallel import apply_sequence_parallel

    device = torch.device("cpu")
    if setting.device_type == "cuda":
        device = torch.device("cuda", 0 if setting.shared_gpu else rank)
        torch.cuda.set_device(device)
    found: dict[str, Any] = {}
    with torch.inference_mode():
        if world > 1 and not setting.shared_gpu:
            bandwidth.use(bandwidth.measure(device))  # as workers do
        mesh = build_mesh(MeshShape(1, way.ring, way.ulysses), device)
        model = skeleton(setting.size, setting.layers)
        hybrid = StagedThroughCpuHybrid if setting.shared_gpu else HybridAttention
        strategy = hybrid(mesh.get_group("ulysses"), mesh.get_group("ring"))
        staged = strategy if setting.shared_gpu else None
        split = apply_sequence_parallel(model.diffusion_model, plan_for(model.diffusion_model), mesh, staged)
        fill(model.diffusion_model, RandomWeights(model.diffusion_model, device), device)
        given = inputs(setting.size, device)
        for name in setting.names:
            try:
                check_kernel(name, way.ring, device)
                chosen = kernel(name, device)
            except (ValueError, ImportError) as reason:
                found[name] = {"missing": str(reason)}
                continue
            row: dict[str, Any] = {"takes": chosen.name, "error": attention_error(strategy, chosen, setting, device)}
            options: dict[str, Any] = {}
            split.install(options, chosen)

            def step(options: dict[str, Any] = options) -> Tensor:
                return model.apply_model(**given, transformer_options=dict(options["transformer_options"]))

            row["seconds"] = median(step, device, setting.repeats)
            result = step()
            row["result"] = result.float().cpu().numpy() if rank == 0 else None
            found[name] = row
    return found


def attention_error(strategy: Any, chosen: Any, setting: Setting, device: torch.device) -> float:
    """Return the relative L2 of this rank's queries to attention in float32 over all keys. Collective."""
    from raylight.attention.torch_kernels import reference_attention

    world, rank = dist.get_world_size(), dist.get_rank()
    local = setting.tokens // world
    generator = torch.Generator(device).manual_seed(1)
    shape = (1, HEADS, local * world, WIDTH)
    whole = [torch.randn(shape, generator=generator, device=device).bfloat16() for _ in range(3)]
    mine = slice(rank * local, (rank + 1) * local)
    out = strategy(chosen, *(t[:, :, mine].contiguous() for t in whole), (local,) * world, None, None)
    queries = min(SOME_QUERIES, local)
    q, k, v = (t[:, :SOME_HEADS].float() for t in whole)
    true, _ = reference_attention(q[:, :, mine][:, :, :queries], k, v, None, None)
    return relative(out[:, :SOME_HEADS, :queries], true)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", nargs="+", required=True)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--size", default="wan-480p", choices=SIZES)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=14040)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--share-gpu", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    shared, over_nccl = given.share_gpu, given.device == "cuda" and not given.share_gpu
    setting = Setting(tuple(given.names), given.size, given.layers, given.tokens, given.repeats, given.device, shared)
    figures: dict[str, Any] = {"versions": versions(), "layers": given.layers, "tokens": given.tokens}
    print(figures["versions"])
    print(f"{SIZES[given.size].title}, {given.layers} layers; attention of {HEADS} heads, {given.tokens} tokens")
    print(f"{'GPUs way':<16} {'backend':<18} {'error':>8} {'step s':>8} {'of the first':>12} {'L2':>8}")
    first, missing = None, {}
    ways = [(1, Way("one GPU"))]
    ways += [(n, way) for n in given.ranks for way in (Way("Ulysses", ulysses=n), Way("ring", ring=n))]
    for world, way in ways:
        kind = "cuda" if over_nccl else "cpu"  # of the process group
        ranks = values(run_ranks(world, measure, way, setting, timeout_s=400, device_type=kind))
        for name in given.names:
            rows = [rank[name] for rank in ranks]
            if reason := next((row["missing"] for row in rows if "missing" in row), None):
                missing[f"{name}, {way.title}"] = reason
                continue
            result = torch.from_numpy(rows[0]["result"])
            seconds, error = max(row["seconds"] for row in rows), max(row["error"] for row in rows)
            first = (seconds, result) if first is None else first
            other = relative(result, first[1])
            print(
                f"{f'{world} {way.title}':<16} {name + (' = ' + rows[0]['takes']) * (rows[0]['takes'] != name):<18} "
                f"{error:>8.1e} {seconds:>8.4f} {first[0] / seconds:>11.2f}x {other:>8.1e}",
                flush=True,
            )
            figures[f"{world} {way.title} {name}"] = {"error": error, "seconds": seconds, "l2": other}
    for what, reason in missing.items():
        print(f"{what}: {reason}")
    figures["missing"] = missing
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
