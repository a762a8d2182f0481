"""The ComfyUI server for all tests: with a tiny Wan, two prompts, and another author's pack."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from loras import lora_for
from safetensors.torch import load_file, save_file

from raylight.dev.demo.comfy_server import ComfyServer
from raylight.dev.demo.graphs import Graph
from raylight.dev.demo.prompts import random_prompt, write_prompt
from raylight.dev.demo.tiny import write_checkpoint

SUPPORT = Path(__file__).resolve().parent
MODEL = "wan.safetensors"


class SharedServer(ComfyServer):
    """Tests may only add files to `models`, under names of their own.

    Each test needs its own seed or size: ComfyUI does not run a graph again that it has cached.
    """

    def __init__(self, work: Path) -> None:
        self.models = work / "models"
        prompts, packs = work / "datasets", work / "packs"
        write_checkpoint(self.models / MODEL, "wan-t2v", heads=3)
        write_prompt(prompts / "positive", random_prompt(9, 4096, seed=1))
        write_prompt(prompts / "negative", random_prompt(6, 4096, seed=2))
        shutil.copytree(SUPPORT / "foreign_pack", packs / "foreign_pack")
        paths = dict.fromkeys(("diffusion_models", "loras", "vae"), self.models)
        paths |= {"datasets": prompts, "custom_nodes": packs}
        super().__init__(work, model_paths=paths, extra_args=["--preview-method", "latent2rgb"])

    def add_lora(self, name: str, kinds: Iterable[str], seed: int) -> None:
        """Write a LoRA for the model, with layers of these kinds."""
        weights = load_file(self.models / MODEL)
        shapes = {f"diffusion_model.{key}": tuple(tensor.shape) for key, tensor in weights.items()}
        save_file(lora_for(shapes, list(kinds), seed), self.models / name)

    def latent(self, graph: Graph, timeout: float = 180.0) -> torch.Tensor:
        """Run a graph and return the latent that its node "save" saves."""
        return load_file(self.output_files(self.run(graph, timeout), "save")[0])["latent_tensor"]
