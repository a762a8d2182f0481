"""Seconds, memory and error of VAE decodes that are split by rows, against ComfyUI's own decode on one GPU.

    COMFYUI_PATH=/my/ComfyUI python benchmarks/gpu/vae.py --ranks 2 4

decodes a video of 81 frames at 1280x720 with the Wan 2.1 VAE, and an image of 2048x2048 with Flux's, at full size with
random weights in bfloat16. Rank 0 runs the untouched VAE in the same process first. `peak` is the most memory that
PyTorch had allocated on any rank, weights and result included, over that of stock; `L2` the relative error of all rows.
Links are measured first, as workers do. With --exact, both are compared with stock in float32, which tells rounding
from error. With --other-order, the split is measured again with images in the other order of memory than the class's
rule has, and with --hides-from with halos that are hidden from other sizes. With --profile, the kernels that took
longest on rank 0 follow. With --tiny, this is to try the program on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import kernels_of, relative, synchronize
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), os.environ["COMFYUI_PATH"]]

from raylight.dev import full_vaes
from raylight.dev.local_ranks import run_ranks, values

GOALS = {  # speed-up at least, share of stock's memory at most
    ("wan", 2): (1.85, 0.58),
    ("wan", 4): (3.5, 0.33),
    ("flux", 2): (1.7, 1.0),
}
LARGEST_ERROR = 1e-2


def wan(tiny: bool) -> tuple[nn.Module, tuple[int, ...]]:
    """Return the Wan 2.1 VAE, without weights, and the shape of a latent of 81 frames at 1280x720."""
    return full_vaes.wan(8 if tiny else 96), (1, 16, 3, 18, 8) if tiny else (1, 16, 21, 90, 160)


def flux(tiny: bool) -> tuple[nn.Module, tuple[int, ...]]:
    """Return Flux's VAE, without weights, and the shape of a latent of 2048x2048."""
    return full_vaes.flux(32 if tiny else 128), (1, 16, 18, 8) if tiny else (1, 16, 256, 256)


MODELS = {"wan": wan, "flux": flux}


def filled(model: nn.Module) -> nn.Module:
    """Give a model weights that keep activations near 1, the same on every rank."""
    torch.manual_seed(5)
    for name, weight in model.named_parameters():
        fan = weight.shape[1:].numel()
        if weight.ndim > 1 and fan > 1:
            weight.normal_(0, fan**-0.5)
        else:
            weight.normal_(0, 0.1)
            weight.add_(0 if name.endswith("bias") else 1)
    return model.eval()


def timed(decode: Callable[[], Tensor], device: torch.device, repeats: int) -> tuple[Tensor, float, int]:
    """Return the result, the least seconds of a call and the peak of allocated bytes, after one call to warm up."""
    result = decode()
    del result
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    taken = []
    for _ in range(repeats):
        result = None
        if dist.get_world_size() > 1 and decode.__name__ == "together":
            dist.barrier()
        synchronize(device)
        start = time.perf_counter()
        result = decode()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    assert result is not None
    return result, min(taken), torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


@dataclass(frozen=True)
class Setting:
    """What every rank runs. `exact` compares with a result in float32 too."""

    tiny: bool
    repeats: int
    profile: bool
    exact: bool
    other_order: bool
    hides_from: tuple[float, ...]
    device_type: str


def in_float32(name: str, setting: Setting, device: torch.device, z: Tensor) -> Tensor:
    """Return stock's result in float32 throughout, on the CPU, of the weights and the latent in 16 bits."""
    torch.backends.cudnn.allow_tf32 = False
    with device:
        model, _ = MODELS[name](setting.tiny)
        model: Any = filled(model.to(z.dtype)).float()
    result = model.decode(z.float()).cpu()
    torch.backends.cudnn.allow_tf32 = True
    if device.type == "cuda":
        del model
        torch.cuda.empty_cache()
    return result


def measure(rank: int, world: int, name: str, setting: Setting) -> dict[str, Any]:
    """Measure one model on this rank."""
    tiny, repeats, profile, device_type = setting.tiny, setting.repeats, setting.profile, setting.device_type
    from comfy.cli_args import args

    args.cpu = device_type == "cpu"  # before ComfyUI picks a device
    from raylight.parallel import bandwidth
    from raylight.worker.parallel_vae import apply_row_parallel

    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.inference_mode():
        with device:
            model, shape = MODELS[name](tiny)
            model = filled(model.to(dtype))
            z = torch.randn(shape, generator=torch.Generator(device).manual_seed(1), dtype=dtype)
        dist.barrier()
        report: dict[str, Any] = {"rank": rank}

        def alone() -> Tensor:
            return model.decode(z)

        expected = exact = None
        if rank == 0:
            if setting.exact:
                exact = in_float32(name, setting, device, z)
            expected, report["stock_s"], report["stock_bytes"] = timed(alone, device, repeats)
            if profile:
                report["stock_kernels"] = kernels_of(alone, device)
            expected = expected.cpu()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        dist.barrier()
        bandwidth.use(bandwidth.measure(device))
        parallel = apply_row_parallel(model, dist.group.WORLD)

        def together() -> Tensor:
            return model.decode(z)

        result, report["seconds"], report["bytes"] = timed(together, device, repeats)
        counts = parallel.counts
        report["received_bytes"] = counts.received_bytes // (repeats + 1)
        report["exchanges"] = counts.exchanges // (repeats + 1)
        report["share"] = counts.convolved_rows / counts.convolved_of
        if profile:
            kernels = kernels_of(together, device)
            report["kernels"] = kernels if rank == 0 else kernels[:1]
        report["hides_s"] = []
        for least in setting.hides_from:
            usual, parallel.counts.hides_halos_from = parallel.counts.hides_halos_from, least * 2**20
            report["hides_s"].append(timed(together, device, repeats)[1])
            parallel.counts.hides_halos_from = usual
        if setting.other_order:
            parallel.counts.channels_last = not parallel.counts.channels_last
            last, report["last_s"], report["last_bytes"] = timed(together, device, repeats)
            report["last_squares"] = compared(parallel.rows, last, expected, rank)
            del last
            if profile:
                report["last_kernels"] = kernels_of(together, device)
        report["squares"] = compared(parallel.rows, result, expected, rank)
        if setting.exact:
            report["exact_squares"] = compared(parallel.rows, result, exact, rank)
        if exact is not None and expected is not None:
            report["stock_error"] = relative(expected, exact)
    return report


def compared(rows: Callable[[int], tuple[int, int]], result: Tensor, expected: Tensor | None, rank: int) -> list[float]:
    """Return the squared norms of this rank's error and of what was expected of it. Collective."""
    shape = [tuple(expected.shape) if expected is not None else None]
    dist.broadcast_object_list(shape)
    kind = [expected.dtype if expected is not None else None]
    dist.broadcast_object_list(kind)
    full = torch.empty(shape[0], dtype=kind[0], device=result.device)
    if rank == 0 and expected is not None:
        full.copy_(expected)
    dist.broadcast(full, 0)
    start, stop = rows(full.shape[-2])
    mine = full.narrow(-2, start, stop - start).float()
    return [(result.float() - mine).square().sum().item(), mine.square().sum().item()]


def main() -> None:
    """Run all models on all numbers of ranks, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--exact", action="store_true", help="compare with stock in float32 too")
    parser.add_argument("--other-order", action="store_true", help="also with images in the other order of memory")
    parser.add_argument("--hides-from", type=float, nargs="+", default=[], metavar="MIB", help="0: all, inf: none")
    parser.add_argument("--tiny", action="store_true", help="small models, on a CPU if there is no GPU")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    setting = Setting(
        given.tiny, given.repeats, given.profile, given.exact, given.other_order, tuple(given.hides_from), device_type
    )
    results = []
    for world in given.ranks:
        if device_type == "cuda" and torch.cuda.device_count() < world:
            print(f"{world} ranks: there are {torch.cuda.device_count()} GPUs only")
            continue
        for name in given.models:
            arguments = (name, setting)
            reports = values(
                run_ranks(world, measure, *arguments, timeout_s=300, collective_timeout_s=120, device_type=device_type)
            )
            results.append(told(name, world, reports))
            for at, least in enumerate(given.hides_from):
                seconds = max(report["hides_s"][at] for report in reports)
                print(f"    halos hidden from {least:g} MiB a rank: {seconds:.3f} s", flush=True)
    if given.json:
        given.json.write_text(json.dumps(results, indent=1))


def told(name: str, world: int, reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Print what was measured of one model on `world` ranks, and return it."""
    stock, seconds = reports[0]["stock_s"], max(report["seconds"] for report in reports)
    speedup = stock / seconds
    peak = max(report["bytes"] for report in reports) / max(1, reports[0]["stock_bytes"])
    error = (sum(r["squares"][0] for r in reports) / sum(r["squares"][1] for r in reports)) ** 0.5
    least, most = GOALS.get((name, world), (0.0, 1.0))
    met = speedup >= least and peak <= most and error <= LARGEST_ERROR
    print(
        f"{name} on {world}: stock {stock:.3f} s, {reports[0]['stock_bytes'] / 2**30:.2f} GiB; "
        f"split {seconds:.3f} s, {speedup:.2f}x (goal {least}), peak {peak:.2f} (goal {most}), L2 {error:.1e}, "
        f"{reports[0]['exchanges']} exchanges, {max(r['received_bytes'] for r in reports) / 2**20:.0f} MiB received, "
        f"rows of convolutions {max(r['share'] for r in reports):.3f}: {'met' if met else 'NOT MET'}",
        flush=True,
    )
    if "stock_error" in reports[0]:
        squares = [report["exact_squares"] for report in reports]
        ours = (sum(error for error, _ in squares) / sum(norm for _, norm in squares)) ** 0.5
        print(f"    L2 from stock in float32: stock {reports[0]['stock_error']:.2e}, split {ours:.2e}", flush=True)
    if "last_s" in reports[0]:
        seconds = max(report["last_s"] for report in reports)
        share = max(report["last_bytes"] for report in reports) / max(1, reports[0]["stock_bytes"])
        squares = [report["last_squares"] for report in reports]
        error = (sum(error for error, _ in squares) / sum(norm for _, norm in squares)) ** 0.5
        print(
            f"    other order of memory: {seconds:.3f} s, {stock / seconds:.2f}x, peak {share:.2f}, L2 {error:.1e}",
            flush=True,
        )
    for title in ("stock_kernels", "kernels", "last_kernels"):
        for line in reports[0].get(title, []):
            print(f"    {title}: {line}", flush=True)
    keys = ("seconds", "bytes", "received_bytes", "exchanges", "share")
    return {
        "model": name,
        "ranks": world,
        "stock_s": stock,
        "stock_bytes": reports[0]["stock_bytes"],
        "speedup": speedup,
        "peak": peak,
        "l2": error,
        "by_rank": [{key: report[key] for key in keys} for report in reports],
    }


if __name__ == "__main__":
    main()
