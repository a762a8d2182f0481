"""The time of a step on N GPUs, predicted from one GPU. A prediction, not a measurement of N GPUs.

One rank's exact share (its tokens, its heads) is timed on this GPU; the bytes of its collectives take the time that a
link of a given bandwidth takes, beside attention where Raylight overlaps them. With FSDP the weights of each block are
gathered while the block before it computes.

    COMFYUI_PATH=/my/ComfyUI python benchmarks/gpu/prediction.py --json prediction.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from full_size import SIZES, build, inputs, versions
from one_share import Share, share_of

from raylight.parallel.ulysses import CHUNKS, LARGE_BYTES
from raylight.sharding.fsdp import units

LINKS = {"NVLink": 450.0, "PCIe 4 x16": 25.0, "PCIe 3 x8": 6.0}  # GB/s one way


def with_shards(share: Share, blocks: int, block_bytes: int, gigabytes_per_second: float) -> float:
    """Return the seconds of a step with sharded weights: a block waits for a gather that takes longer than the block
    before it, over the same link.
    """
    seconds = share.predicted(gigabytes_per_second)
    gather = block_bytes * (1 - 1 / share.degree) / gigabytes_per_second / 1e9
    exchanged = share.received / gigabytes_per_second / 1e9
    busy = exchanged + blocks * gather  # what the link has to carry in any case
    return max(gather + seconds, gather + busy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["wan-480p", "wan-720p", "flux-1024"], choices=SIZES)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--parts", type=int, default=CHUNKS, help="of an exchange that is large")
    parser.add_argument("--layers", type=int, help="this many layers of each kind instead of all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    figures: dict[str, object] = {"versions": versions()}
    print(figures["versions"])
    for name in options.sizes:
        model = build(name, device, options.layers)
        blocks = list(units(model.diffusion_model).values())
        block_bytes = sum(p.nbytes for p in model.diffusion_model.parameters()) // len(blocks)
        given = inputs(name, device)
        print(
            f"\n{SIZES[name].title}{'' if options.layers is None else f', {options.layers} layers of each kind'}, "
            f"{options.attention}, exchanges in {options.parts} parts: one rank's share measured, N GPUs predicted"
        )
        print(
            f"{'N':>2} {'share s':>9} {'of 1/N':>7} {'attention s':>11} {'peak GB':>8} {'received MB':>11}  "
            + "  ".join(f"{link:>16} {'+ FSDP':>7}" for link in LINKS)
        )
        whole = 0.0
        share_of(model, given, options.ranks[0], options.attention, LARGE_BYTES, options.parts)  # warm-up
        for degree in options.ranks:
            shares = [
                share_of(model, given, degree, options.attention, LARGE_BYTES, options.parts)
                for _ in range(options.repeats)
            ]
            share = next(
                one for one in shares if one.seconds == statistics.median_low(other.seconds for other in shares)
            )
            whole = whole or share.seconds * degree
            predicted = {link: share.predicted(speed) for link, speed in LINKS.items()}
            sharded = {link: with_shards(share, len(blocks), block_bytes, speed) for link, speed in LINKS.items()}
            attention = sum(sum(call.seconds) for call in share.calls)
            print(
                f"{degree:>2} {share.seconds:>9.4f} {share.seconds * degree / whole:>7.1%} {attention:>11.4f} "
                f"{share.peak / 1e9:>8.2f} {share.received / 1e6:>11.0f}  "
                + "  ".join(
                    f"{predicted[link]:>8.4f} {whole / predicted[link]:>6.2f}x {sharded[link]:>7.3f}" for link in LINKS
                ),
                flush=True,
            )
            figures[f"{name} {degree}"] = {
                "seconds": [one.seconds for one in shares],
                "attention_s": attention,
                "peak_bytes": share.peak,
                "received_bytes": share.received,
                "parts": options.parts,
                "predicted_s": predicted,
                "predicted_speed_up": {link: whole / seconds for link, seconds in predicted.items()},
                "predicted_with_fsdp_s": sharded,
            }
        del model, blocks
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
