"""The eager forward on several GPUs: what the host spends to launch it, and the exchange in variants.

    COMFYUI_PATH=/my/ComfyUI python benchmarks/gpu/launching.py --ranks 1 2 4

Each part runs in processes of its own and prints as it goes. `launch` is the time until a forward returns, with the GPU
idle before; `step` until the GPU is done; `graph` that of the same forward as one CUDA graph. `exchange-...` is one
attention call with its exchange, in variants: milliseconds on the GPU, and microseconds of the host; each variant's
result is compared with Raylight's, bit by bit; in `exchange-8-bits` it is another one, as it should be. `shards` and
`offload` are the forward with sharded weights, and `shards-kept` and `offload-kept` where as many of them stay gathered
as fit.
"""

from __future__ import annotations

import argparse
import cProfile
import faulthandler
import io
import json
import os
import pstats
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from full_size import RandomWeights, fill, inputs, skeleton, versions
from measure import synchronize

from raylight.dev.local_ranks import run_ranks
from raylight.parallel import bandwidth

EXCHANGES = {"flux-1024": (24, 4608), "wan-480p": (40, 14040), "wan-720p": (40, 75600)}  # heads and tokens of a call
WIDTH = 128
HANGS_AFTER_S = 25  # a rank that still works on a part says where


def measure(rank: int, world: int, part: str, sizes: list[str], layers: int | None) -> dict[str, Any]:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    faulthandler.dump_traceback_later(HANGS_AFTER_S, repeat=True)
    found: dict[str, Any] = {}
    if world > 1:
        bandwidth.use(bandwidth.measure(device))  # as workers do
    with torch.no_grad():
        if part.startswith("exchange-"):
            return exchanges(world, device, part.removeprefix("exchange-"))
        for one in part.split("+"):
            for size in sizes:
                found[f"{one} {size}"] = forward(size, layers, world, device, one)
    return found


def times(found: dict[str, Any]) -> list[tuple[str, float]]:
    return [(key, value) for key, value in found.items() if isinstance(value, float)]


def say(text: str) -> None:
    """Print on rank 0, at once."""
    if (not dist.is_initialized() or dist.get_rank() == 0) and text:
        print(text, flush=True)


def forward(size: str, layers: int | None, world: int, device: torch.device, part: str) -> dict[str, Any]:
    """Return seconds to launch and to finish a forward, also as a CUDA graph, and the profile of the host. `part` is
    "forward", "shards" or "offload"; with "-kept", as much as fits stays gathered from one forward to the next.
    """
    from raylight.attention.kernels import kernel
    from raylight.parallel.mesh import MeshShape, build_mesh, world_axis
    from raylight.plans import plan_for
    from raylight.sharding.fsdp import shard
    from raylight.worker.sequence_parallel import apply_sequence_parallel

    part_of_weights, _, keeps = part.partition("-")

    model = skeleton(size, layers)
    options: dict[str, Any] = {}
    mesh = build_mesh(MeshShape(ulysses=world), device)
    if world > 1:
        split = apply_sequence_parallel(model.diffusion_model, plan_for(model.diffusion_model), mesh)
        split.install(options, kernel("auto", device))
    weights = RandomWeights(model.diffusion_model, device)
    if part == "forward":
        fill(model.diffusion_model, weights, device)
    else:
        shard(model.diffusion_model, weights, world_axis(mesh), device, part_of_weights == "offload")
    torch.cuda.empty_cache()
    given, inner = inputs(size, device), dict(options.get("transformer_options", {}))

    def step() -> Any:
        return model.apply_model(**given, transformer_options=dict(inner))

    say(f"{world} ranks, {part}, {size}: weights are there")
    if keeps:
        keep_gathered(model.diffusion_model, world_axis(mesh).get_group(), device, step)
    found: dict[str, Any] = timed(step, device, 7)
    torch.cuda.reset_peak_memory_stats()
    result = step().clone()
    found["peak_bytes"] = torch.cuda.max_memory_allocated()
    calls: dict[str, float] = {}
    with counted(calls):
        step()
        synchronize(device)
    found["collectives"] = calls.get("seconds", 0.0)
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(2):
        step()
        synchronize(device)
    profile.disable()
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(16)
    say(f"{world} ranks, {part}, {size}: eager " + str({k: round(1e3 * v, 2) for k, v in times(found)}))
    say(f"peak {found['peak_bytes'] / 1e9:.2f} GB; collectives: {calls}")
    return found | graphed(step, result, device) | {"profile": text.getvalue()}


def keep_gathered(model: Any, group: Any, device: torch.device, step: Callable[[], Any]) -> None:
    """Keep as many units of a sharded model as the worker would, beside forwards such as `step`."""
    from raylight.sharding.fsdp import gathering_of
    from raylight.worker.kept_units import KeptUnits
    from raylight.worker.spare_memory import spare_memory

    gathering = gathering_of(model)
    kept = KeptUnits(type(model).__name__, gathering, group, spare_memory(device))
    kept.begin(True, True, None, lambda: None, lambda: 0)
    for _ in range(4):  # two are measured, and the next gathers what is kept
        step()
    synchronize(device)
    blocks = max(0, gathering.number - 1)
    say(f"{blocks} of {gathering.blocks} blocks stay gathered, {kept.bytes / 1e9:.2f} GB")


def graphed(step: Callable[[], Any], expected: Any, device: torch.device) -> dict[str, Any]:
    """Return the seconds of the forward as a graph."""
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            static = step()
        graph.replay()
        synchronize(device)
        equal = bool(torch.equal(static, expected))
        found = timed(graph.replay, device, 7)
    except Exception as failure:
        say(f"as a graph: {type(failure).__name__}: {str(failure)[:500]}")
        return {}
    say(f"as a graph: {1e3 * found['step']:.2f} ms, {'equal' if equal else 'ANOTHER RESULT'}")
    return {"graph": found["step"]}


@contextmanager
def counted(calls: dict[str, float]) -> Iterator[None]:
    """Count the host's seconds in collectives, without a profiler."""
    originals = {name: getattr(dist, name) for name in ("all_to_all_single", "all_gather_into_tensor")}

    def wrap(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            taken = time.perf_counter() - start
            calls[name] = calls.get(name, 0) + 1
            calls["seconds"] = calls.get("seconds", 0.0) + taken
            calls["longest"] = max(calls.get("longest", 0.0), taken)
            return result

        return call

    for name, function in originals.items():
        setattr(dist, name, wrap(name, function))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)


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


def exchanges(world: int, device: torch.device, which: str) -> dict[str, Any]:
    """Return, for each size and variant, milliseconds of the GPU and microseconds of the host for one call."""
    from raylight.attention.kernels import kernel

    attend, group = kernel("auto", device), dist.group.WORLD
    found: dict[str, Any] = {}
    strategies = variants(group, which)
    say(f"{world} ranks: one attention call{'':<14} GPU ms   host us")
    for size, (heads, tokens) in EXCHANGES.items():
        local = tokens // world
        generator = torch.Generator(device).manual_seed(dist.get_rank())
        # As a model makes them after its norms and position tables: (1, H, S_LOCAL, D), contiguous.
        q, k, v = (torch.randn(1, heads, local, WIDTH, generator=generator, device=device).bfloat16() for _ in range(3))
        own = [torch.randn(1, heads // world, tokens, WIDTH, device=device).bfloat16() for _ in range(3)]
        shown(found, f"{size} attention alone", per_call(lambda own=own: attend(*own, None, None), device))
        expected = None
        for name, make in strategies.items():
            strategy = make()

            def call(strategy: Any = strategy, q: Any = q, k: Any = k, v: Any = v, local: int = local) -> Any:
                return strategy(attend, q, k, v, (local,) * world, None, None)

            call()
            result = call().clone()
            expected = result if expected is None else expected
            equal = bool(torch.equal(result, expected))
            shown(found, f"{size} {name}", per_call(call, device) | {"equal": equal})
    return found


def shown(found: dict[str, Any], name: str, values: dict[str, Any]) -> None:
    found[name] = values
    other = "" if values.get("equal", True) else "  ANOTHER RESULT"
    say(f"{name:<40} {values['gpu_ms']:>8.3f} {values['host_us']:>8.0f}{other}")


def variants(group: Any, which: str) -> dict[str, Callable[[], Any]]:
    """Return what makes each strategy; the first is the one that Raylight uses."""
    from raylight.parallel.eight_bit_ulysses import EightBitUlysses
    from raylight.parallel.ulysses import UlyssesAttention

    ours: dict[str, Callable[[], Any]] = {"raylight": lambda: UlyssesAttention(group)}
    if which == "parts":
        return ours | {
            "1 part": lambda: UlyssesAttention(group, chunks=1),
            "2 parts": lambda: UlyssesAttention(group, large_bytes=0, chunks=2),
            "4 parts": lambda: UlyssesAttention(group, large_bytes=0, chunks=4),
        }
    if which == "8-bits":
        return ours | {
            "8 bits": lambda: EightBitUlysses(group),
            "8 bits, 1 part": lambda: EightBitUlysses(group, chunks=1),
            "8 bits, 2 parts": lambda: EightBitUlysses(group, large_bytes=0, chunks=2),
        }
    if which == "channels":
        made = {ctas: limited(ctas) for ctas in (2, 4, 8, 16)}
        return ours | {
            f"{parts} parts, {ctas} CTAs": lambda parts=parts, one=one: UlyssesAttention(
                one, large_bytes=0, chunks=parts
            )
            for ctas, one in made.items()
            for parts in (1, 2)
        }
    from symmetric import SymmetricUlysses

    ranks = dist.get_world_size(group)
    largest_bytes = max(3 * tokens * (heads // ranks) * WIDTH * 2 for heads, tokens in EXCHANGES.values())
    strategy = SymmetricUlysses(group, which, largest_bytes)
    return ours | {f"symmetric memory, {which}": lambda: strategy}


def limited(ctas: int) -> Any:
    """Return a group of all ranks whose kernels take at most so many blocks. Collective."""
    options = dist.ProcessGroupNCCL.Options()
    options.config.max_ctas, options.config.min_ctas = ctas, 1
    return dist.new_group(backend="nccl", pg_options=options)


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
    parser.add_argument("--parts", nargs="+", default=["forward", "shards", "exchange-parts", "exchange-channels"])
    parser.add_argument("--sizes", nargs="+", default=["flux-1024"])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--variables", nargs="*", default=[], help="NAME=VALUE for the ranks")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for one part")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.update(dict(one.split("=", 1) for one in options.variables))
    figures: dict[str, Any] = {"versions": versions()}
    print(figures["versions"], options.variables, flush=True)
    for world in options.ranks:
        for part in options.parts:
            if world == 1 and part.startswith("exchange"):
                continue
            answers = run_ranks(
                world,
                measure,
                part,
                options.sizes,
                options.layers,
                timeout_s=options.timeout,
                collective_timeout_s=options.timeout / 2,
                device_type="cuda",
            )
            for rank, answer in enumerate(answers):
                if answer.error:
                    print(f"{world} ranks, {part}, rank {rank}: {answer.error[-900:]}", flush=True)
            figures[f"{world} {part}"] = [answer.value for answer in answers]
            if options.json:
                options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
