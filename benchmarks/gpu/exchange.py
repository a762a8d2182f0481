"""The cost of one rank's exchange on the GPU besides the link, and of attention to its heads in chunks.

    COMFYUI_PATH=/my/ComfyUI python benchmarks/gpu/exchange.py --json exchange.json

`pack` copies q, k and v into the buffer that is sent, `place` copies what comes back; `floor` moves the same bytes by
one contiguous copy each. `attention` is to all heads of the rank in the layout in which they arrive; `apart` the same
with q, k and v contiguous; `in 2` and `in 4` are as many calls of fewer heads each.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from full_size import versions
from measure import median

from raylight.attention.kernels import kernel
from raylight.parallel.exchange_layout import head_chunks, pack_heads, place_heads, unpack_heads

SIZES = {"wan-480p": (40, 14040), "wan-720p": (40, 75600), "flux-1024": (24, 4608)}
WIDTH = 128


def measure(heads: int, tokens: int, ranks: int, device: torch.device, repeats: int) -> dict[str, float]:
    local = tokens // ranks
    q, k, v = (
        torch.randn(1, local, heads * WIDTH, device=device, dtype=torch.bfloat16)
        .unflatten(-1, (heads, WIDTH))
        .transpose(1, 2)
        for _ in range(3)
    )
    ranges = head_chunks(heads, 1, ranks, 1)[0].queries
    attend = kernel("auto", device)

    def clock(function: Any) -> float:
        return median(function, device, repeats)

    buffer = pack_heads((q, k, v), (ranges, ranges, ranges))
    out = q.new_empty(1, local, heads, WIDTH)
    back = torch.randn(out.numel(), device=device, dtype=out.dtype)
    found = {
        "pack": clock(lambda: pack_heads((q, k, v), (ranges, ranges, ranges))),
        "place": clock(lambda: place_heads(back, ranges, out)),
        "floor": 4 * clock(lambda: back.clone()),
    }
    own = heads // ranks
    # As if every rank had sent what this one sends to itself.
    received = buffer.view(q.dtype).view(ranks, -1)[0].repeat(ranks)
    views = unpack_heads(received, local * ranks, 1, [(own, WIDTH)] * 3)
    whole = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in views]
    found["attention"] = clock(lambda: attend(*views, None, None))
    found["apart"] = clock(lambda: attend(*whole, None, None))
    for parts in (2, 4):
        if own >= parts:
            cut = [
                [t.contiguous() for t in pieces]
                for pieces in zip(*(t.transpose(1, 2).tensor_split(parts, 2) for t in whole), strict=True)
            ]
            found[f"in {parts}"] = clock(
                lambda cut=cut: [attend(*(t.transpose(1, 2) for t in piece), None, None) for piece in cut]
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    figures: dict[str, Any] = {"versions": versions()}
    print(figures["versions"])
    columns = ("pack", "place", "floor", "attention", "apart", "in 2", "in 4")
    print(f"{'milliseconds':<12} {'N':>2} " + " ".join(f"{column:>9}" for column in columns))
    for name in options.sizes:
        for ranks in options.ranks:
            found = measure(*SIZES[name], ranks, device, options.repeats)
            figures[f"{name} {ranks}"] = found
            print(
                f"{name:<12} {ranks:>2} "
                + " ".join(f"{1e3 * found[column]:>9.3f}" if column in found else " " * 9 for column in columns),
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
