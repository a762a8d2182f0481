"""Random stored conditioning in place of a text encoder's, for ComfyUI's Load Training Dataset node.

A text encoder of real size is gigabytes; its output is a small tensor that ComfyUI can load.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def write_prompt(folder: Path, conditioning: list[Any]) -> None:
    """Store one CONDITIONING, a list of [tensor (B, tokens, width), options], as a dataset folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.json").write_text(json.dumps({"num_samples": 1, "num_shards": 1}))
    torch.save(
        {"latents": [{"samples": torch.zeros(1, 16, 1, 1)}], "conditioning": [conditioning]}, folder / "shard_0000.pkl"
    )


def random_prompt(tokens: int, width: int, seed: int, pooled: int = 0, **options: Any) -> list[Any]:
    """Return random conditioning of one prompt: (1, tokens, width), and a pooled output (1, pooled) if there is one."""
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(1, tokens, width, generator=generator)
    if pooled:
        options["pooled_output"] = torch.randn(1, pooled, generator=generator)
    return [[embedding, options]]
