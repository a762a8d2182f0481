"""Results, seconds per step, memory and speed-up on several GPUs of one machine, one rank each, over NCCL.

    COMFYUI_PATH=/my/ComfyUI python benchmarks/gpu/multi.py --json multi.json

finds the GPUs and runs 1, 2, 4 and 8 ranks, as far as there are as many GPUs. `L2` is the error against one rank with
the same random weights; `link` the share of the step in which the GPU runs NCCL's kernels, by the profiler, hidden or
not; `bare` that in which it runs nothing else. `predicted` is from the file that prediction.py wrote, for the link
named by --link. `graph` is the step replayed as a CUDA graph: seconds, speed-up over the eager step of one GPU, for how
long it holds up the host, how the result differs from the eager step's (`=` for not at all), and what graphs hold.
--graphs off leaves it out. With --profile, the kernels that took longest on rank 0 follow, of the graph where there is
one.

With --device cpu, or --share-gpu (all ranks on one GPU, rings staged through the CPU), ranks use gloo: this is to try
the program, since times mean nothing then.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from full_size import SIZES, RandomWeights, fill, inputs, skeleton, versions
from measure import between, communication, kernels_of, mark, relative, synchronize
from torch import Tensor

from raylight.dev.local_ranks import run_ranks, values

LARGEST = 1e-2  # relative L2 of results in bfloat16
LARGEST_OF_GRAPH = 0.0  # it runs the same kernels
# Speed-ups of Ulysses, eager or as a graph.
GOALS = {"wan-720p": {2: 1.95, 4: 3.8, 8: 7.2}, "wan-480p": {2: 1.9, 4: 3.6}, "flux-1024": {2: 1.75, 4: 3.1}}
GOALS_OF_OTHERS = {2: 1.7, 4: 3.0}
LARGEST_COST_OF_FSDP = 1.03
LARGEST_DIFFERENCE = 0.05  # from the prediction


@dataclass(frozen=True)
class Way:
    """Degrees of the mesh, and whether weights are sharded over all ranks: by `held` if they hold unequally much."""

    name: str
    ulysses: int = 1
    ring: int = 1
    batch: int = 1
    shards: bool = False
    held: tuple[int, ...] = ()


def ways(world: int) -> list[Way]:
    """Return what is run on `world` ranks. The batch axis has two rows, positive and negative prompt, as with CFG."""
    if world == 1:
        return [Way("one GPU")]
    found = [
        Way("Ulysses", ulysses=world),
        Way("ring", ring=world),
        Way("FSDP", batch=world, shards=True),
        Way("FSDP by memory", batch=world, shards=True, held=(3, *[1] * (world - 1))),
        Way("FSDP + Ulysses", ulysses=world, shards=True),
        Way("CFG axis x Ulysses" if world > 2 else "CFG axis", ulysses=world // 2, batch=2),
    ]
    if world > 2:
        found.insert(2, Way("Ulysses x ring", ulysses=world // 2, ring=2))
    return found


@dataclass(frozen=True)
class Setting:
    """What every rank runs."""

    size: str
    layers: int | None
    repeats: int
    cfg: bool
    shared_gpu: bool
    device_type: str
    graphs: bool = False
    attention: str = "auto"
    profile: bool = False


def measure(rank: int, world: int, way: Way, setting: Setting) -> dict[str, Any]:
    """Return this rank's seconds of each step, peak bytes, shares of communication, and the result on rank 0."""
    device = torch.device(setting.device_type, 0 if setting.shared_gpu else rank)
    logging.basicConfig(format=f"rank {rank}: %(message)s")
    logging.getLogger("raylight").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif setting.device_type == "cpu":
        device = torch.device("cpu")
    with torch.no_grad():
        forward, model, graphed = prepared(way, setting, device, world)
        for _ in range(2):  # NCCL connects ranks and cuDNN plans its kernels in the first
            result = forward()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        taken = timed(forward, setting.repeats, device)
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        link, bare = communication(forward, device)
        graph: dict[str, Any] = {"kernels": kernels_of(forward, device) if setting.profile else []}
        if graphed is not None:
            graph |= as_graph(forward, graphed, model, result, setting, device)
    return graph | {
        "seconds": taken,
        "peak_bytes": peak,
        "link": link,
        "bare": bare,
        "result": result.float().cpu().numpy() if rank == 0 else None,
    }


def timed(forward: Any, repeats: int, device: torch.device) -> list[float]:
    """Return the seconds of each of several steps."""
    taken = []
    for _ in range(repeats):
        synchronize(device)
        start = mark(device)
        forward()
        end = mark(device)
        synchronize(device)
        taken.append(between(start, end))
    return taken


def as_graph(
    forward: Any, graphed: Any, model: Any, expected: Tensor, setting: Setting, device: torch.device
) -> dict[str, Any]:
    """Return the seconds of each step as a CUDA graph, its relative L2 against the eager one, and the graph's bytes."""
    from raylight.parallel.graphs import ON
    from raylight.sharding.fsdp import announce_to
    from raylight.worker import cuda_graphs

    graphed.use(ON, "benchmark", "", announce_to(model))
    launch = []
    for _ in range(4):  # as it is, recorded, captured, replayed
        synchronize(device)
        start = time.perf_counter()
        result = forward()
        launch.append(time.perf_counter() - start)
    found = {
        "graph_seconds": timed(forward, setting.repeats, device),
        "graph_launch_s": launch,
        "graph_l2": relative(result, expected),
        "graph_equal": torch.equal(result, expected),
        "graph_bytes": cuda_graphs.held_bytes(device),
    }
    if setting.profile:
        found["kernels"] = kernels_of(forward, device)
    graphed.remove()
    return found


def prepared(way: Way, setting: Setting, device: torch.device, world: int) -> tuple[Any, Any, Any]:
    """Return a function that does one step on this rank, its model, and what replays it as a graph if the setting asks
    for it.
    """
    from staged_ring import StagedThroughCpuHybrid

    from raylight.attention.kernels import kernel
    from raylight.parallel import bandwidth
    from raylight.parallel.batch import BatchAxis, Rows
    from raylight.parallel.mesh import MeshShape, build_mesh, world_axis
    from raylight.plans import plan_for
    from raylight.sharding.fsdp import shard
    from raylight.sharding.rows import RowSplit
    from raylight.worker.cuda_graphs import GraphedForward, pool_of
    from raylight.worker.sequence_parallel import apply_sequence_parallel

    if world > 1 and not setting.shared_gpu:
        bandwidth.use(bandwidth.measure(device))  # as workers do
    mesh = build_mesh(MeshShape(way.batch, way.ring, way.ulysses), device)
    model = skeleton(setting.size, setting.layers)
    diffusion_model = model.diffusion_model
    staged = StagedThroughCpuHybrid(mesh.get_group("ulysses"), mesh.get_group("ring")) if setting.shared_gpu else None
    options: dict[str, Any] = {}
    split = apply_sequence_parallel(diffusion_model, plan_for(diffusion_model), mesh, staged)
    split.install(options, kernel(setting.attention, device))
    weights = RandomWeights(diffusion_model, device)
    if way.shards:
        one_axis = world_axis(mesh)
        shard(diffusion_model, weights, one_axis, device, split=RowSplit.over(one_axis, way.held))
    else:
        fill(diffusion_model, weights, device)
    given = inputs(setting.size, device)
    total = 2 if setting.cfg else 1
    if setting.cfg:
        given = {
            name: torch.cat([value, value.flip(-1) if name == "c_crossattn" else value])
            if isinstance(value, Tensor)
            else value
            for name, value in given.items()
        }
    axis = BatchAxis(mesh.get_group("batch"))
    graphed = None
    if setting.graphs and device.type == "cuda":
        graphed = GraphedForward(diffusion_model, pool_of(device), lambda: way, split.tokens.begin)

    def call(rows: Rows) -> Tensor:
        return model.apply_model(**rows.of(given), transformer_options=dict(options["transformer_options"]))

    def forward() -> Tensor:
        # With one row and a batch axis, as FSDP alone has it, every rank does the same work.
        return axis.call(call, total) if axis.can_split(total) else call(Rows(0, total, total))

    return forward, diffusion_model, graphed


def run(world: int, way: Way, setting: Setting, timeout_s: float) -> dict[str, Any]:
    """Return one row of the table: the slowest rank's median, the largest peak, the mean shares."""
    over_gloo = setting.shared_gpu or setting.device_type == "cpu"
    ranks = values(
        run_ranks(
            world,
            measure,
            way,
            setting,
            timeout_s=timeout_s,
            collective_timeout_s=timeout_s / 2,
            device_type="cpu" if over_gloo else "cuda",
        )
    )
    graph = {}
    if "graph_seconds" in ranks[0]:
        graph = {
            "graph_seconds": max(statistics.median(rank["graph_seconds"]) for rank in ranks),
            "graph_launch_s": ranks[0]["graph_launch_s"],
            "graph_l2": max(rank["graph_l2"] for rank in ranks),
            "graph_equal": all(rank["graph_equal"] for rank in ranks),
            "graph_bytes": max(rank["graph_bytes"] for rank in ranks),
        }
    return graph | {
        "kernels": ranks[0]["kernels"],
        "seconds": max(statistics.median(rank["seconds"]) for rank in ranks),
        "peak_bytes": max(rank["peak_bytes"] for rank in ranks),
        "link": statistics.mean(rank["link"] for rank in ranks),
        "bare": statistics.mean(rank["bare"] for rank in ranks),
        "result": torch.from_numpy(ranks[0]["result"]),
    }


def graph_column(row: dict[str, Any], alone_s: float) -> str:
    """Return what a row says of the step as a graph."""
    if "graph_seconds" not in row:
        return ""
    seconds = row["graph_seconds"]
    how = "=" if row["graph_equal"] else f"{row['graph_l2']:.1e}"
    host = f"host {row['graph_launch_s'][-1] * 1e3:.1f} ms"
    return f"{seconds:.4f} {alone_s / seconds:.2f}x {host} {how} {row['graph_bytes'] / 1e9:.1f} GB"


def report(size: str, worlds: list[int], options: argparse.Namespace, predicted: dict[str, Any]) -> dict[str, Any]:
    """Measure and print the table of one size. Return its figures, with missed goals in `missed`."""
    figures: dict[str, Any] = {"missed": []}
    expected: dict[bool, Tensor] = {}
    alone: dict[bool, float] = {}
    seconds: dict[tuple[int, str], float] = {}
    print(
        f"\n{SIZES[size].title}{'' if options.layers is None else f', {options.layers} layers of each kind'}\n"
        f"{'GPUs':>4} {'way':<20} {'s a step':>9} {'speed-up':>9} {'efficiency':>10} {'peak GB':>8} {'link':>6} "
        f"{'bare':>6} {'L2':>8} {'predicted':>9} {'graph':>37}"
    )
    for world in worlds:
        for way in [*ways(world), *([Way("one GPU, CFG")] if world == 1 and max(worlds) > 1 else [])]:
            if options.ways and way.name not in options.ways:
                continue
            cfg = "CFG" in way.name
            setting = Setting(
                size,
                options.layers,
                options.repeats,
                cfg,
                options.share_gpu,
                options.device,
                options.graphs == "on",
                options.attention,
                options.profile,
            )
            try:
                row = run(world, way, setting, options.timeout)
            except RuntimeError as failure:  # out of memory, say: the other ways can still be measured
                figures[f"{world} {way.name}"] = {"failed": traceback.format_exc()}
                figures["missed"].append(f"{world} GPUs, {way.name}: {str(failure).strip().splitlines()[-1]}")
                print(f"{world:>4} {way.name:<20} failed: {str(failure).strip().splitlines()[-1][:90]}", flush=True)
                continue
            result = row.pop("result")
            expected.setdefault(cfg, result)
            alone.setdefault(cfg, row["seconds"])
            seconds[world, way.name] = row["seconds"]
            error = relative(result, expected[cfg])
            speed_up = alone[cfg] / row["seconds"]
            promised = predicted.get(f"{size} {world}", {}).get("predicted_s", {}).get(options.link)
            forecast = "" if promised is None or way.name != "Ulysses" else f"{promised:9.4f}"
            print(
                f"{world:>4} {way.name:<20} {row['seconds']:>9.4f} {speed_up:>8.2f}x {speed_up / world:>10.1%} "
                f"{row['peak_bytes'] / 1e9:>8.2f} {row['link']:>6.1%} {row['bare']:>6.1%} {error:>8.1e} {forecast:>9} "
                f"{graph_column(row, alone[cfg])}",
                *row["kernels"],
                sep="\n    ",
                flush=True,
            )
            figures[f"{world} {way.name}"] = row | {"speed_up": speed_up, "relative_l2": error}
            where = f"{world} GPUs, {way.name}"
            if row.get("graph_l2", 0) > LARGEST_OF_GRAPH:
                figures["missed"].append(f"{where}: as a graph relative L2 {row['graph_l2']:.1e}")
            if error > LARGEST:
                figures["missed"].append(f"{where}: relative L2 {error:.1e}, goal {LARGEST:g}")
            if forecast and abs(row["seconds"] / promised - 1) > LARGEST_DIFFERENCE:
                figures["missed"].append(f"{where}: {row['seconds'] / promised - 1:+.1%} of what was predicted")
            best = alone[cfg] / min(row["seconds"], row.get("graph_seconds", row["seconds"]))
            goal = GOALS.get(size, GOALS_OF_OTHERS).get(world, 0)
            if options.device == "cuda" and way.name == "Ulysses" and best < goal:
                figures["missed"].append(f"{where}: {best:.2f}x, goal {goal}x")
        both = seconds.get((world, "FSDP + Ulysses")), seconds.get((world, "Ulysses"))
        if all(both) and both[0] / both[1] > LARGEST_COST_OF_FSDP:
            figures["missed"].append(f"{world} GPUs: FSDP costs {both[0] / both[1] - 1:.1%}, goal 3%")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["wan-480p", "wan-720p", "flux-1024"], choices=SIZES)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--ways", nargs="+", help="only these ways, by their names in the table")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, help="this many layers of each kind instead of all")
    parser.add_argument("--prediction", type=Path, help="the file that prediction.py wrote")
    parser.add_argument("--link", default="NVLink")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one row")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--share-gpu", action="store_true")
    parser.add_argument("--attention", default="auto", help="TORCH_FLASH is what stock ComfyUI takes")
    parser.add_argument("--graphs", default="on", choices=("on", "off"))
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    gpus = torch.cuda.device_count() if options.device == "cuda" else 0
    one_each = options.device == "cuda" and not options.share_gpu
    worlds = [world for world in options.ranks if world <= gpus or not one_each]
    predicted = json.loads(options.prediction.read_text()) if options.prediction else {}
    figures: dict[str, Any] = {
        "versions": versions(),
        "GPUs": gpus,
        "options": {key: str(value) for key, value in vars(options).items()},
        "ways": [asdict(w) for n in worlds for w in ways(n)],
    }
    print(figures["versions"], f"{gpus} GPUs, so {worlds} ranks")
    for size in options.sizes:
        figures[size] = report(size, worlds, options, predicted)
        if options.json:
            options.json.write_text(json.dumps(figures, indent=1))
    missed = [f"{SIZES[size].title}: {what}" for size in options.sizes for what in figures[size]["missed"]]
    print("\nmissed its goal, or is to be explained:\n" + "\n".join(missed) if missed else "\nall goals were met")


if __name__ == "__main__":
    main()
