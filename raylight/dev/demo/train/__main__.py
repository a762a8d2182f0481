"""Train the demo's model: `python -m raylight.dev.demo.train`, with COMFYUI_PATH naming a ComfyUI.

Writes a diffusion transformer and a VAE for it to raylight/dev/demo/model/. docs/demo-model.md describes them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

MODEL = Path(__file__).resolve().parents[1] / "model"
CODEC_SEED, TRANSFORMER_SEED, DECODER_SEED = 0, 0, 1
STEPS = {"transformer": 1800, "decoder": 1500}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m raylight.dev.demo.train", description=__doc__)
    parser.add_argument("--only", choices=STEPS, help="train one of the two")
    parser.add_argument("--steps", type=int, help=f"training steps of each (default {STEPS})")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU (default 1)")
    parser.add_argument("--device", default="cpu", help="where to train: cpu (default) or cuda")
    parser.add_argument("--output", type=Path, default=MODEL, help="where the files go")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    _find_comfyui()
    # After ComfyUI's code can be found.
    from comfy.latent_formats import Wan21

    from . import autoencoder, transformer

    options.output.mkdir(parents=True, exist_ok=True)
    latents = Wan21()
    codec = autoencoder.Codec.of_scenes(latents.latents_mean.flatten(), latents.latents_std.flatten(), CODEC_SEED)
    steps = {part: options.steps or STEPS[part] for part in ([options.only] if options.only else STEPS)}
    if count := steps.get("transformer"):
        weights = transformer.train(
            codec, count, TRANSFORMER_SEED, _report("transformer", count), device=options.device
        )
        _save(weights, options.output / "raylight-demo.safetensors", {"transformer": transformer.CONFIG})
    if count := steps.get("decoder"):
        weights = autoencoder.train_decoder(
            codec, count, DECODER_SEED, _report("decoder", count), device=options.device
        )
        vae = autoencoder.vae_state(autoencoder.encoder_state(codec), weights)
        _save(vae, options.output / "raylight-demo-vae.safetensors", {})
    return 0


def _report(name: str, steps: int) -> Callable[[int, float], None]:
    """Print the mean loss of every 50 steps."""
    began, losses = time.monotonic(), []

    def report(step: int, loss: float) -> None:
        losses.append(loss)
        if (step + 1) % 50 == 0 or step + 1 == steps:
            mean = sum(losses) / len(losses)
            print(f"{name} {step + 1}/{steps}   loss {mean:.4f}   {time.monotonic() - began:.0f} s", flush=True)
            losses.clear()

    return report


def _save(tensors: dict[str, torch.Tensor], path: Path, config: dict[str, object]) -> None:
    """Save in half precision; ComfyUI computes in what suits the device."""
    metadata = {"config": json.dumps(config)} if config else None
    save_file({name: tensor.half().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)
    print(f"{path}   {path.stat().st_size / 1e6:.1f} MB", flush=True)


def _find_comfyui() -> None:
    if not os.environ.get("COMFYUI_PATH"):
        sys.exit("which ComfyUI to train with is not known: set COMFYUI_PATH to its directory")
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    from comfy.cli_args import args

    args.cpu = args.use_pytorch_cross_attention = True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
