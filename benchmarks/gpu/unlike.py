"""Two GPUs of one kind of which one is slowed by another process: equal shares, shares by speed, and each alone.

    COMFYUI_PATH=/my/ComfyUI python benchmarks/gpu/unlike.py --json unlike.json

Competing processes compute on GPU 1 all the time, so that with one of them it has half of its time for us. `alone` is
the whole step on each GPU by itself, both at once; the goal is 90 % of the sum of these speeds. `tried` shares by the
trial that workers make when they start, `exact` by the times of `alone`. L2 is against the step alone.

With --device cpu each rank has a core, and the competitor the core of rank 1: this is to try the program, and times
mean something only if nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from full_size import SIZES, versions
from measure import relative, synchronize
from multi import Setting, Way, prepared, timed

from raylight.dev.local_ranks import run_ranks, values
from raylight.parallel.process_group import of_all_ranks
from raylight.parallel.shares import ALIKE, Speeds, use
from raylight.parallel.speed_trial import Trial
from raylight.parallel.speed_trial import measure as try_speed

WORLD = 2
SLOWED = 1  # the rank
GOAL = 0.9  # of the sum of both speeds
LARGEST = 1e-2  # relative L2 of results in bfloat16


def compete(device_type: str, index: int) -> None:
    """Compute on a GPU, or on a core of the CPU, until the process is ended."""
    if device_type == "cpu":
        os.sched_setaffinity(0, {index})
        torch.set_num_threads(1)
        device, size = torch.device("cpu"), 512
    else:
        device, size = torch.device("cuda", index), 4096
    matrix = torch.randn(size, size, device=device, dtype=torch.float16 if device.type == "cuda" else torch.float32)
    while True:
        for _ in range(4):
            matrix @ matrix
        synchronize(device)


def measure(rank: int, world: int, setting: Setting) -> dict[str, Any]:
    """Return this rank's median seconds a step and relative L2 of each way, and what the trial found."""
    if setting.device_type == "cpu":
        os.sched_setaffinity(0, {rank})
        device = torch.device("cpu")
    else:
        device = torch.device("cuda", rank)
    found: dict[str, Any] = {"trial": try_speed(device)}
    expected = None
    for name in ("alone", "equal", "tried", "exact"):
        way = Way(name, batch=world) if name == "alone" else Way(name, ulysses=world)
        use({"tried": found["trial"].speeds(), "exact": found.get("exact speeds", ALIKE)}.get(name, ALIKE))
        with torch.no_grad():
            forward, *_ = prepared(way, setting, device, world)
            forward()
            result = forward()
            seconds = statistics.median(timed(forward, setting.repeats, device))
        if expected is None:
            expected = result
            each = tuple(of_all_ranks(int(1e9 / seconds)))
            found["exact speeds"] = Trial(each, each).speeds()
        found[name] = seconds, relative(result, expected)
        del forward, result
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def report(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Print the table; return its figures, with missed goals in `missed`."""
    trial: Trial = ranks[0]["trial"]
    alone = [rank["alone"][0] for rank in ranks]
    best = 1 / sum(1 / seconds for seconds in alone)
    print(f"alone: {', '.join(f'{seconds:.4f} s' for seconds in alone)}; the sum of both speeds: {best:.4f} s a step")
    for name, speeds in (("trial", trial.speeds()), ("alone", ranks[0]["exact speeds"])):
        print(f"speeds by {name}: {_words(speeds)}")
    figures: dict[str, Any] = {"alone_s": alone, "best_s": best, "trial": [trial.products, trial.attention]}
    figures["missed"] = []
    print(f"{'shares':<8} {'s a step':>9} {'of the sum':>10} {'of the fast one':>15} {'L2':>8}")
    for name in ("equal", "tried", "exact"):
        seconds, error = (max(rank[name][place] for rank in ranks) for place in (0, 1))
        print(f"{name:<8} {seconds:>9.4f} {best / seconds:>10.1%} {min(alone) / seconds:>14.2f}x {error:>8.1e}")
        figures[name] = {"seconds": seconds, "of_the_sum": best / seconds, "relative_l2": error}
        if error > LARGEST:
            figures["missed"].append(f"{name}: relative L2 {error:.1e}")
    if figures["tried"]["of_the_sum"] < GOAL:
        figures["missed"].append(f"{figures['tried']['of_the_sum']:.1%} of the sum of both speeds, goal {GOAL:.0%}")
    return figures


def _words(speeds: Speeds) -> str:
    return "alike" if speeds == ALIKE else f"products {speeds.products}, attention {speeds.attention}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="wan-480p", choices=SIZES)
    parser.add_argument("--layers", type=int, default=10, help="this many layers of each kind; 0 for all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--competitors", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=500)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(versions())
    layers = options.layers or "all"
    print(f"{SIZES[options.size].title}, {layers} layers, {options.competitors} competing with rank {SLOWED}")
    context = multiprocessing.get_context("spawn")
    competitors = [
        context.Process(target=compete, args=(options.device, SLOWED), daemon=True) for _ in range(options.competitors)
    ]
    for process in competitors:
        process.start()
    time.sleep(10)  # until they compute
    setting = Setting(options.size, options.layers or None, options.repeats, False, False, options.device)
    try:
        ranks = values(
            run_ranks(
                WORLD,
                measure,
                setting,
                timeout_s=options.timeout,
                collective_timeout_s=options.timeout / 2,
                device_type=options.device,
            )
        )
    finally:
        for process in competitors:
            process.kill()
    figures = report(ranks)
    if options.json:
        options.json.write_text(json.dumps(figures | {"versions": versions()}, indent=1))
    print("missed: " + "; ".join(figures["missed"]) if figures["missed"] else "all goals were met")


if __name__ == "__main__":
    main()
