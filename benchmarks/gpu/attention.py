"""Attention backends side by side: the kernel alone, its error, and a step of Wan 14B with it.

    COMFYUI_PATH=/my/ComfyUI python benchmarks/gpu/attention.py --json attention.json

`error` is the relative L2 to reference attention in float32, over some queries of some heads; `lse` the largest error
of the log-sum-exp, and `with lse` the time of a call that returns it, which a ring needs. `step` is one forward of the
model. Backends that cannot be used here are listed with the reason.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from full_size import SIZES, build, inputs, versions
from measure import median, relative
from torch import Tensor

from raylight.attention import torch_kernels
from raylight.attention.kernels import AUTO, NAMES, kernel
from raylight.worker import transformer_options

HEADS, WIDTH = 40, 128
SOME_HEADS, SOME_QUERIES = 2, 512


def measure_kernel(name: str, tokens: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """Return times and errors of one backend at (1, 40, tokens, 128) in bfloat16, or why it cannot be used."""
    try:
        chosen = kernel(name, device)
    except (ValueError, ImportError) as reason:
        return {"missing": str(reason)}
    generator = torch.Generator(device).manual_seed(1)
    q, k, v = (
        torch.randn(1, tokens, HEADS, WIDTH, generator=generator, device=device, dtype=torch.bfloat16).transpose(1, 2)
        for _ in range(3)
    )
    part = q[:, :SOME_HEADS, :SOME_QUERIES], k[:, :SOME_HEADS], v[:, :SOME_HEADS]
    true, true_lse = torch_kernels.reference_attention(*(t.float() for t in part), None, None)
    out = chosen(q, k, v, None, None)
    found: dict[str, Any] = {"takes": chosen.name, "error": relative(out[:, :SOME_HEADS, :SOME_QUERIES], true)}
    found["seconds"] = median(lambda: chosen(q, k, v, None, None), device, repeats)
    # reference_attention, the TORCH of a ring, serves what no other kernel supports, and is slow at this size.
    if hasattr(chosen, "with_lse") and chosen.name != "TORCH":
        out, lse = chosen.with_lse(q, k, v, None, None)
        found["ring_error"] = relative(out[:, :SOME_HEADS, :SOME_QUERIES], true)
        found["lse_error"] = (lse.float()[:, :SOME_HEADS, :SOME_QUERIES] - true_lse).abs().max().item()
        found["with_lse_seconds"] = median(lambda: chosen.with_lse(q, k, v, None, None), device, repeats)
    return found


def measure_step(
    model: Any, given: dict[str, Tensor], name: str | None, device: torch.device, repeats: int
) -> tuple[float, Tensor]:
    """Return the median seconds of a forward, and its result, with a backend or with ComfyUI's own choice."""
    options: dict[str, Any] = {"transformer_options": {}}
    if name is not None:
        transformer_options.install_override(
            options, lambda own, q, k, v, mask, scale: own(q, k, v, mask, scale), kernel(name, device)
        )

    def forward() -> Tensor:
        return model.apply_model(**given, transformer_options=dict(options["transformer_options"]))

    with torch.inference_mode():
        return median(forward, device, repeats), forward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="wan-480p", choices=SIZES)
    parser.add_argument("--tokens", type=int, nargs="*", default=[14040, 75600])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    figures: dict[str, Any] = {"versions": versions()}
    print(figures["versions"])
    missing = {}
    for tokens in options.tokens:
        print(f"\n{HEADS} heads of {WIDTH}, {tokens} tokens, bfloat16")
        print(f"{'backend':<18} {'kernel ms':>9} {'TFLOP/s':>8} {'error':>8} {'with lse ms':>11} {'lse':>8}")
        for name in NAMES:
            row = measure_kernel(name, tokens, device, options.repeats)
            if "missing" in row:
                missing[name] = row["missing"]
                continue
            figures[f"{tokens} {name}"] = row
            operations = 4 * HEADS * WIDTH * tokens**2
            ring = f"{1e3 * row['with_lse_seconds']:>11.2f} {row['lse_error']:>8.1e}" if "lse_error" in row else ""
            print(
                f"{name + (' = ' + row['takes']) * (name == AUTO):<18} {1e3 * row['seconds']:>9.2f} "
                f"{operations / row['seconds'] / 1e12:>8.0f} {row['error']:>8.1e} {ring}",
                flush=True,
            )
    figures["missing"] = missing
    for name, reason in missing.items():
        print(f"{name}: {reason}")
    model, given = build(options.size, device, options.layers), inputs(options.size, device)
    stock, expected = measure_step(model, given, None, device, options.repeats)
    print(f"\none step of {SIZES[options.size].title}\n{'backend':<18} {'s':>8} {'of ComfyUI':>11} {'relative L2':>11}")
    print(f"{'ComfyUI by itself':<18} {stock:>8.3f}")
    figures["step ComfyUI"] = stock
    for name in NAMES:
        if name in missing:
            continue
        seconds, result = measure_step(model, given, name, device, options.repeats)
        error = relative(result, expected.float())
        print(f"{name:<18} {seconds:>8.3f} {seconds / stock:>11.3f} {error:>11.1e}", flush=True)
        figures[f"step {name}"] = {"seconds": seconds, "of_comfyui": seconds / stock, "relative_l2": error}
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
