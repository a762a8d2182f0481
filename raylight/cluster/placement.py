"""The GPU and CPU of each rank, and the environment that its process starts with."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping

import ray
import torch
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from . import ray_environment
from .config import ServiceSpec, SessionConfig
from .errors import RunCancelled
from .ray_environment import user_variables
from .ray_runtime import loopback_interface

ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_LOCAL_S, _POLL_S = 30.0, 0.1


def reserve(config: SessionConfig, wants_cancel: Callable[[], bool]) -> PlacementGroup:
    """Reserve a CPU, and a GPU if Ray is to choose it, for each rank.

    Raises RuntimeError: when there are not enough. Raises RunCancelled: when cancelled.
    """
    bundle = {"CPU": 1.0}
    if config.device_type == "cuda" and not config.gpu_select:
        bundle["GPU"] = 1.0
    group = placement_group([dict(bundle) for _ in range(config.world_size)], strategy="PACK")
    deadline = time.monotonic() + (_LOCAL_S if config.is_local else config.start_timeout_s)
    while not group.wait(timeout_seconds=_POLL_S):
        if wants_cancel():
            remove_placement_group(group)
            raise RunCancelled
        # A cluster may grow; a machine does not.
        never = config.is_local and any(
            ray.cluster_resources().get(name, 0) < count * config.world_size for name, count in bundle.items()
        )
        if time.monotonic() < deadline and not never:
            continue
        free = ray.cluster_resources() if never else ray.available_resources()
        remove_placement_group(group)
        has, remedy = ("has", "Lower GPU") if never else ("has free:", "Lower GPU, or free what uses them")
        raise RuntimeError(
            f"{config.world_size} workers need {_counts(bundle, bundle)} each, but Ray {has} {_counts(free, bundle)}. "
            f"{remedy}.{user_variables()}"
        )
    return group


def _counts(resources: Mapping[str, float], names: Iterable[str]) -> str:
    counts = {name: f"{resources.get(name, 0):g}" for name in sorted(names, reverse=True)}
    return " and ".join(f"{count} {name}{'' if count == '1' else 's'}" for name, count in counts.items())


def environment(config: SessionConfig, service: ServiceSpec) -> dict[str, str]:
    """Return the environment variables that all ranks' processes start with."""
    path = [*service.python_path, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    variables = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(path))}
    for name in ALLOCATOR_VARIABLES:
        if "cudaMallocAsync" in os.environ.get(name, ""):
            # ComfyUI sets this allocator for itself. With NCCL it runs out of memory.
            kept = [setting for setting in os.environ[name].split(",") if not setting.startswith("backend:")]
            variables[name] = ",".join(kept)
    interface = loopback_interface() if config.is_local else None
    if interface is not None:
        variables |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    # As Ray sets it for an actor, which is too late where PyTorch was imported before.
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")} | variables


def gpu_environment(config: SessionConfig, rank: int) -> dict[str, str]:
    """Return the environment variables by which a rank sees its GPU only, none if Ray sets them."""
    if not config.gpu_select:
        return {}
    return ray_environment.select_gpu(config.gpu_select[rank], os.environ, torch.version.hip is not None)
