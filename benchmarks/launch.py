"""What splitting a model costs the host: Python and kernel launches of one forward, without a GPU.

    COMFYUI_PATH=/my/ComfyUI python benchmarks/launch.py

Models have all their blocks and a width so small that computing takes no time. One rank of N runs alone, over a process
group that exchanges nothing (results are wrong, the host's work is the same), in turns with stock ComfyUI. `over stock`
is what remains per block; `operations` are those of PyTorch's dispatcher, about one launch each on a GPU.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), os.environ["COMFYUI_PATH"]]

from comfy.cli_args import args as comfy_args

comfy_args.cpu = True
comfy_args.use_pytorch_cross_attention = True  # as on a GPU

import comfy.supported_models

from raylight.attention.kernels import kernel
from raylight.dev.zoo import families
from raylight.parallel.mesh import MeshShape, build_mesh, world_axis
from raylight.plans import plan_for
from raylight.sharding.fsdp import shard
from raylight.worker.sequence_parallel import apply_sequence_parallel

CPU = torch.device("cpu")
SIZES = {
    "flux": (
        "Flux Dev",
        {"hidden_size": 64, "num_heads": 8, "depth": 19, "depth_single_blocks": 38, "axes_dim": [2, 2, 4]},
        {"x": (1, 16, 16, 16), "c_crossattn": (1, 16, 24), "y": (1, 20), "guidance": (1,)},
        57,
    ),
    "wan": (
        "Wan T2V",
        {"dim": 8 * 12, "ffn_dim": 64, "num_heads": 8, "num_layers": 40},
        {"x": (1, 16, 2, 8, 8), "c_crossattn": (1, 16, 24)},
        40,
    ),
}


class Operations(TorchDispatchMode):
    """Counts the operations of PyTorch's dispatcher, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        name = str(function.overloadpacket)
        self.counts[name] = self.counts.get(name, 0) + 1
        return function(*given, **(named or {}))


def build(name: str) -> Any:
    """Return ComfyUI's model with all its blocks, its weights zero."""
    family, widths, _, _ = SIZES[name]
    config = getattr(comfy.supported_models, families()[family].config)({**families()[family].unet_config, **widths})
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device=CPU).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    return model


def forward_of(name: str, degree: int, shards: bool) -> Callable[[], Any]:
    """Return one forward of rank 0 of `degree`; of stock ComfyUI if that is 0."""
    model, (family, _, shapes, _) = build(name), SIZES[name]
    inputs = {key: torch.zeros(shape, dtype=torch.float32) for key, shape in shapes.items()}
    text = families()[family].unet_config.get("context_in_dim") or families()[family].unet_config.get("text_dim")
    inputs["c_crossattn"] = torch.zeros(*shapes["c_crossattn"][:2], text, dtype=torch.float32)
    inputs["t"] = torch.tensor([0.7])
    options: dict[str, Any] = {}
    if degree:
        mesh = build_mesh(MeshShape(ulysses=degree), CPU)
        split = apply_sequence_parallel(model.diffusion_model, plan_for(model.diffusion_model), mesh)
        split.install(options, kernel("TORCH_FLASH", CPU))
        if shards:
            weights = {key: value.detach() for key, value in model.diffusion_model.named_parameters()}
            shard(model.diffusion_model, weights, world_axis(mesh), CPU)
    given = dict(options.get("transformer_options", {}))
    return lambda: model.apply_model(**inputs, transformer_options=dict(given))


def seconds(forwards: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Return the least seconds of each, measured in turns."""
    taken: list[list[float]] = [[] for _ in forwards]
    for _ in range(repeats + 1):
        for forward, of_forward in zip(forwards, taken, strict=True):
            start = time.thread_time()
            forward()
            of_forward.append(time.thread_time() - start)
    return [min(of_forward[1:]) for of_forward in taken]


def operations(forward: Callable[[], Any]) -> dict[str, int]:
    with Operations() as counted:
        forward()
    return counted.counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--degree", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--fsdp", action="store_true", help="weights sharded as well")
    parser.add_argument("--profile", action="store_true", help="print where Python's time goes")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=options.degree)
    figures: dict[str, Any] = {"torch": torch.__version__}
    columns = f"{'ms: stock':>10} {'split':>8} {'ratio':>6} {'us over stock a block':>22} {'operations over stock':>22}"
    print(f"{'':<6} {columns}")
    with torch.no_grad():
        for name in options.sizes:
            blocks = SIZES[name][-1]
            stock, split = forward_of(name, 0, False), forward_of(name, options.degree, options.fsdp)
            alone, ours = seconds([stock, split], options.repeats)
            before, after = operations(stock), operations(split)
            more = {key: after.get(key, 0) - before.get(key, 0) for key in before | after}
            added = sum(more.values()) / blocks
            print(
                f"{name:<6} {1e3 * alone:>10.2f} {1e3 * ours:>8.2f} {ours / alone:>5.2f}x "
                f"{1e6 * (ours - alone) / blocks:>22.0f} {added:>22.1f}"
            )
            largest = sorted(((n / blocks, key) for key, n in more.items() if n), reverse=True)
            print("       " + ", ".join(f"{key} {n:.1f}" for n, key in largest if abs(n) >= 0.1))
            figures[name] = {"stock_s": alone, "split_s": ours, "operations": more}
            if options.profile:
                profile = cProfile.Profile()
                profile.enable()
                for _ in range(options.repeats):
                    split()
                profile.disable()
                pstats.Stats(profile).sort_stats("tottime").print_stats(45)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
