"""What a rank holds in memory, for people: where it runs out, and in Raylight Status."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from .job import HeldModel, RankMemory
from .residents import Resident


def memory(device: torch.device, models: Sequence[Resident]) -> RankMemory:
    """How full a rank is. On the CPU `free_bytes` and `total_bytes` are of the machine."""
    held = tuple(HeldModel(model.recipe.name, model.recipe.sharding, model.patcher.loaded_size(), model.host_bytes)
                 for model in models)
    process = psutil.Process().memory_info().rss
    if device.type != "cuda":
        machine = psutil.virtual_memory()
        return RankMemory(process, machine.available, machine.total, 0, held)
    free, total = torch.cuda.mem_get_info(device)
    return RankMemory(process, free, total, torch.cuda.memory_allocated(device), held)


def in_words(device: torch.device, models: Sequence[Resident]) -> str:
    """What a rank holds, as the end of a sentence."""
    now = memory(device, models)
    weights = ", ".join(f"{model.name} ({model.sharding}, {_gb(model.device_bytes)} on {device.type}, "
                        f"{_gb(model.host_bytes)} of its own in system memory)" for model in now.models) or "no model"
    if device.type != "cuda":
        return f"{weights}; its process takes {_gb(now.process_bytes)}, and the machine has {_gb(now.free_bytes)} left"
    others = now.total_bytes - now.free_bytes - torch.cuda.memory_reserved(device)
    return (f"{weights}; all its tensors take {_gb(now.tensor_bytes)} of {_gb(now.total_bytes)}, other programs "
            f"(ComfyUI among them) {_gb(max(0, others))}, and {_gb(now.free_bytes)} are free")


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
