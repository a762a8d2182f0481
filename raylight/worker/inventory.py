"""What a rank holds in memory, for the user."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from raylight.host.jobs import HeldModel, RankMemory
from raylight.host.log_messages import gb
from raylight.host.machine_memory import available_memory, total_memory

from . import cuda_graphs
from .model_cache import CachedModel


def memory(device: torch.device, models: Sequence[CachedModel]) -> RankMemory:
    """Return how full a rank is. On the CPU `free_bytes` and `total_bytes` are of the machine, or of its container."""
    held = tuple(
        HeldModel(
            model.recipe.name,
            model.recipe.sharding,
            model.patcher.loaded_size(),
            model.host_bytes,
            model.patcher.kept_bytes,
        )
        for model in models
    )
    process = psutil.Process().memory_info().rss
    if device.type != "cuda":
        return RankMemory(process, available_memory(), total_memory(), 0, held)
    free, total = torch.cuda.mem_get_info(device)
    graphs, graph_bytes = cuda_graphs.number(device), cuda_graphs.held_bytes(device)
    return RankMemory(process, free, total, torch.cuda.memory_allocated(device), held, graphs, graph_bytes)


def describe(device: torch.device, models: Sequence[CachedModel]) -> str:
    """Return what a rank holds in memory, as the end of a sentence."""
    now = memory(device, models)
    weights = (
        ", ".join(
            f"{model.name} ({model.sharding}, {gb(model.device_bytes)} on {device.type}, "
            f"{f'{gb(model.kept_bytes)} kept gathered, ' if model.kept_bytes else ''}"
            f"{gb(model.host_bytes)} of its own in system memory)"
            for model in now.models
        )
        or "no model"
    )
    if device.type != "cuda":
        return f"{weights}; its process takes {gb(now.process_bytes)}, and the machine has {gb(now.free_bytes)} left"
    others = now.total_bytes - now.free_bytes - torch.cuda.memory_reserved(device)
    return (
        f"{weights}; all its tensors take {gb(now.tensor_bytes)} of {gb(now.total_bytes)}, other programs "
        f"(ComfyUI among them) {gb(max(0, others))}, and {gb(now.free_bytes)} are free"
    )
