"""The text of Raylight Status: the workers, their memory and models, and the links between them."""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch

from raylight.cluster import active_session, unlike_workers
from raylight.cluster.config import SessionConfig
from raylight.cluster.place import Place
from raylight.cluster.session import Session
from raylight.host.jobs import RankMemory
from raylight.host.log_messages import gb
from raylight.host.worker_service import WorkerService
from raylight.parallel.bandwidth import Links

from .workers import ask_all

_NONE = "no workers are running: they start with the first prompt that has a Ray loader"


def overview() -> str:
    """Describe the GPUs and the workers that run now, in lines. Starts nothing."""
    running = active_session.running()
    lines = [f"PyTorch {torch.__version__}, Ray {version('ray')}, Python {platform.python_version()}", *_gpus(), ""]
    if running is None:
        return "\n".join([*lines, _NONE])
    try:
        memory = ask_all(running, WorkerService.memory)
    except Exception as error:
        return "\n".join([*lines, f"the workers do not answer: {error}"])
    return "\n".join([*lines, *_workers(running, memory), "", *_links(running.places, running.links)])


def _gpus() -> list[str]:
    """Describe the GPUs of this machine, as this process sees them."""
    if not torch.cuda.is_available():
        return ["this machine has no GPU that workers can use"]
    lines = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        lines.append(f"GPU {index}: {torch.cuda.get_device_name(index)}, {gb(free)} of {gb(total)} free")
    return lines


def how(config: SessionConfig) -> str:
    """Say how workers of a configuration are arranged."""
    shape = config.mesh
    if config.by_run:
        return "degrees by the run" if shape.ring == 1 else f"ring {shape.ring}, other degrees by the run"
    return f"batch {shape.batch} x ring {shape.ring} x Ulysses {shape.ulysses}"


def _workers(running: Session, memory: dict[int, RankMemory]) -> list[str]:
    lines = [f"{running.config.world_size} workers: {how(running.config)}"]
    lines += unlike_workers.describe(running.places, running.arrangement)
    for rank, place in running.places.items():
        of_rank = memory[rank]
        where = "GPU" if place.gpu is not None else "machine"
        lines.append(
            f"{place}: process {gb(of_rank.process_bytes)}, {where} {gb(of_rank.free_bytes)} of "
            f"{gb(of_rank.total_bytes)} free"
        )
        lines += [
            f"    holds {model.name} ({model.sharding}): {gb(model.device_bytes)} on the device, "
            f"{gb(model.host_bytes)} of its own in system memory"
            f"{f'; {gb(model.kept_bytes)} stay gathered on the device' if model.kept_bytes else ''}"
            for model in of_rank.models
        ]
        if of_rank.graphs:
            lines.append(f"    holds {of_rank.graphs} CUDA graphs: {gb(of_rank.graph_bytes)}")
    return lines


def _links(places: dict[int, Place], links: Links | None) -> list[str]:
    if links is None:
        return ["the links between the workers were not measured" if len(places) > 1 else "one worker: no links"]
    lines = [
        f"an all-reduce takes {links.latency_s * 1e6:.0f} us; bandwidth in each direction, with both in use, in GB/s:"
    ]
    lines.append("        " + "".join(f"{f'rank {rank}':>9}" for rank in places))
    for one in places:
        row = [links.bytes_per_s.get((min(one, other), max(one, other))) for other in places]
        cells = "".join(f"{'-' if speed is None else f'{speed / 1e9:.1f}':>9}" for speed in row)
        lines.append(f"{f'rank {one}':<8}{cells}")
    return lines
