"""The eager forward on several GPUs: what the host spends to launch it, and the exchange in variants.

    COMFYUI_PATH=/my/ComfyUI python benchmarks/gpu/launching.py --ranks 1 2 4 --parts forward exchange shards

`launch` is the time until a forward returns, with the GPU idle before; `step` until the GPU is done. `exchange` is one
attention call with its exchange, in variants: milliseconds on the GPU, and microseconds of the host. Each variant's
result is compared with Raylight's, bit by bit.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import os
import pstats
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from full_size import RandomWeights, fill, inputs, skeleton, versions
from measure import synchronize

from raylight.dev.local_ranks import run_ranks

EXCHANGES = {"flux-1024": (24, 4608), "wan-480p": (40, 14040)}  # heads and tokens of a call
WIDTH = 128


def measure(rank: int, world: int, parts: list[str], sizes: list[str], layers: int | None) -> dict[str, Any]:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    found: dict[str, Any] = {}
    with torch.no_grad():
        for part in parts:
            try:
                if part == "exchange" and world > 1:
                    found[part] = exchanges(world, device)
                elif part == "forward" or (part == "shards" and world > 1):
                    for size in sizes:
                        found[f"{part} {size}"] = forward(size, layers, world, device, part == "shards")
            except Exception:
                found[part] = traceback.format_exc()[-1500:]
    return found


def forward(size: str, layers: int | None, world: int, device: torch.device, shards: bool) -> dict[str, Any]:
    """Return seconds to launch and to finish a forward, and rank 0's profile of the host."""
    from raylight.attention.kernels import kernel
    from raylight.parallel.mesh import MeshShape, build_mesh, world_axis
    from raylight.plans import plan_for
    from raylight.sharding.fsdp import shard
    from raylight.worker.sequence_parallel import apply_sequence_parallel

    model = skeleton(size, layers)
    options: dict[str, Any] = {}
    if world > 1:
        mesh = build_mesh(MeshShape(ulysses=world), device)
        split = apply_sequence_parallel(model.diffusion_model, plan_for(model.diffusion_model), mesh)
        split.install(options, kernel("auto", device))
    weights = RandomWeights(model.diffusion_model, device)
    if shards:
        shard(model.diffusion_model, weights, world_axis(mesh), device)
    else:
        fill(model.diffusion_model, weights, device)
    given, inner = inputs(size, device), dict(options.get("transformer_options", {}))

    def step() -> Any:
        return model.apply_model(**given, transformer_options=dict(inner))

    found = timed(step, device, 7)
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(2):
        step()
        synchronize(device)
    profile.disable()
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(22)
    return found | {"profile": text.getvalue()}


def timed(function: Callable[[], Any], device: torch.device, repeats: int) -> dict[str, float]:
    launched, finished = [], []
    for _ in range(repeats + 2):
        if dist.is_initialized():
            dist.barrier()
        synchronize(device)
        start = time.perf_counter()
        function()
        launched.append(time.perf_counter() - start)
        synchronize(device)
        finished.append(time.perf_counter() - start)
    return {"launch": statistics.median(launched[2:]), "step": statistics.median(finished[2:])}


def exchanges(world: int, device: torch.device) -> dict[str, Any]:
    """Return, for each size and variant, seconds of the GPU and of the host for one call."""
    from raylight.attention.kernels import kernel

    attend, group = kernel("auto", device), dist.group.WORLD
    found: dict[str, Any] = {}
    strategies = variants(group, world)
    for size, (heads, tokens) in EXCHANGES.items():
        local = tokens // world
        generator = torch.Generator(device).manual_seed(dist.get_rank())
        # As a model makes them after its norms and position tables: (1, H, S_LOCAL, D), contiguous.
        q, k, v = (torch.randn(1, heads, local, WIDTH, generator=generator, device=device).bfloat16() for _ in range(3))
        own = [torch.randn(1, heads // world, tokens, WIDTH, device=device).bfloat16() for _ in range(3)]
        found[f"{size} attention alone"] = per_call(lambda own=own: attend(*own, None, None), device)
        expected = None
        for name, make in strategies.items():
            try:
                strategy = make()

                def call(strategy: Any = strategy, q: Any = q, k: Any = k, v: Any = v, local: int = local) -> Any:
                    return strategy(attend, q, k, v, (local,) * world, None, None)

                call()
                result = call().clone()
                expected = result if expected is None else expected
                found[f"{size} {name}"] = per_call(call, device) | {"equal": bool(torch.equal(result, expected))}
            except Exception as failure:
                found[f"{size} {name}"] = {"failed": f"{type(failure).__name__}: {str(failure)[:300]}"}
    return found


def variants(group: Any, world: int) -> dict[str, Callable[[], Any]]:
    """Return what makes each strategy, once; the first is the one that Raylight uses."""
    from raylight.parallel.ulysses import UlyssesAttention

    made: dict[Any, Any] = {}

    def once(key: Any, make: Callable[[], Any]) -> Any:
        if key not in made:
            made[key] = make()
        return made[key]

    def limited(ctas: int) -> Any:
        options = dist.ProcessGroupNCCL.Options()
        options.config.max_ctas, options.config.min_ctas = ctas, 1
        return dist.new_group(backend="nccl", pg_options=options)

    def symmetric(how: str) -> Any:
        from symmetric import SymmetricUlysses

        return once(how, lambda: SymmetricUlysses(group, how))

    found: dict[str, Callable[[], Any]] = {
        "raylight": lambda: UlyssesAttention(group),
        "1 part": lambda: UlyssesAttention(group, chunks=1),
        "2 parts": lambda: UlyssesAttention(group, large_bytes=0, chunks=2),
        "4 parts": lambda: UlyssesAttention(group, large_bytes=0, chunks=4),
    }
    for ctas in (2, 4, 8, 16):
        found[f"1 part, {ctas} CTAs"] = lambda ctas=ctas: UlyssesAttention(once(ctas, lambda: limited(ctas)), chunks=1)
        found[f"2 parts, {ctas} CTAs"] = lambda ctas=ctas: UlyssesAttention(
            once(ctas, lambda: limited(ctas)), large_bytes=0, chunks=2
        )
    found["symmetric memory, copies"] = lambda: symmetric("copies")
    found["symmetric memory, a kernel"] = lambda: symmetric("kernel")
    return found


def per_call(function: Callable[[], Any], device: torch.device, calls: int = 20) -> dict[str, float]:
    for _ in range(3):
        function()
    synchronize(device)
    dist.barrier()
    synchronize(device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    synchronize(device)
    dist.barrier()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(5):
        function()
    host = (time.perf_counter() - start) / 5
    synchronize(device)
    return {"gpu_ms": begin.elapsed_time(end) / calls, "host_us": 1e6 * host}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--parts", nargs="+", default=["forward", "exchange"])
    parser.add_argument("--sizes", nargs="+", default=["flux-1024"])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--variables", nargs="*", default=[], help="NAME=VALUE for the ranks")
    parser.add_argument("--timeout", type=float, default=110)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.update(dict(one.split("=", 1) for one in options.variables))
    figures: dict[str, Any] = {"versions": versions()}
    print(figures["versions"], options.variables)
    for world in options.ranks:
        answers = run_ranks(
            world,
            measure,
            options.parts,
            options.sizes,
            options.layers,
            timeout_s=options.timeout,
            collective_timeout_s=60,
            device_type="cuda",
        )
        for rank, answer in enumerate(answers):
            if answer.error:
                print(f"{world} ranks, rank {rank}: {answer.error[-1500:]}")
        if any(answer.error for answer in answers):
            continue
        figures[str(world)] = [answer.value for answer in answers]
        for name in answers[0].value:
            of_ranks = [answer.value[name] for answer in answers]
            report(world, name, of_ranks)
        if options.json:
            options.json.write_text(json.dumps(figures, indent=1))


def report(world: int, name: str, of_ranks: list[Any]) -> None:
    if isinstance(of_ranks[0], str):
        print(f"{world} ranks, {name}: failed\n" + of_ranks[0])
    elif name == "exchange":
        print(f"\n{world} ranks: one attention call\n{'':<40} {'GPU ms':>8} {'host us':>8}")
        for variant in of_ranks[0]:
            values = [one[variant] for one in of_ranks]
            if any("failed" in one for one in values):
                print(f"{variant:<40} {next(one['failed'] for one in values if 'failed' in one)}")
                continue
            equal = "" if all(one.get("equal", True) for one in values) else "  ANOTHER RESULT"
            gpu, host = (max(one[key] for one in values) for key in ("gpu_ms", "host_us"))
            print(f"{variant:<40} {gpu:>8.3f} {host:>8.0f}{equal}")
    else:
        launch, step = (1e3 * max(one[key] for one in of_ranks) for key in ("launch", "step"))
        print(f"\n{world} ranks, {name}: launch {launch:.1f} ms, step {step:.1f} ms\n" + of_ranks[0]["profile"])


if __name__ == "__main__":
    main()
