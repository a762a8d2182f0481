"""The machine, GPU and CPU of each rank, and its process there: the environment, the start and the end."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import ray
import torch
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from . import machines, ray_environment
from .actor import RankActor
from .config import ANY, ServiceSpec, SessionConfig
from .errors import RunCancelled
from .ray_environment import PATH_VARIABLE, user_variables
from .ray_runtime import RUNTIME, loopback_interface
from .timeouts import with_timeout

logger = logging.getLogger(__name__)

ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_LOCAL_S, _POLL_S = 30.0, 0.1
_GROW_S = 10.0  # a cluster may grow; a machine does not
_CLUSTER_S = 10.0  # for Ray to reserve what is free
_LOOK_S = 1.0  # between looks at all machines: each is asked by a connection
_PINNED = 0.001  # of the resource that each machine has one of


def reserve(config: SessionConfig, wants_cancel: Callable[[], bool]) -> PlacementGroup:
    """Reserve a CPU, and a GPU if Ray is to choose it, for each rank. In a cluster, choose the machine of each rank.

    Raises RuntimeError: when there are not enough. Raises TimeoutError: when the cluster does not answer. Raises
    RunCancelled: when cancelled.
    """
    bundle = _bundle(config.device_type, config.gpu_select)
    return _reserve_here(config, bundle, wants_cancel) if config.is_local else _reserve(config, bundle, wants_cancel)


def decided(config: SessionConfig) -> SessionConfig:
    """Return a configuration without what it leaves to the cluster: GPUs if its machines have some, else CPUs, and as
    many workers as there are GPUs, or one on each machine without.

    Raises RuntimeError: when there are not enough for the least mesh. Raises TimeoutError: when the cluster does not
    answer.
    """
    if not config.is_open:
        return config
    found = with_timeout(machines.alive, machines.LIST_S, machines.LIST)
    on_gpus = sum(machines.workers_on(one.resources, _bundle("cuda")) for one in found)
    device_type = config.device_type
    if device_type == ANY:
        device_type = "cuda" if on_gpus else "cpu"
    try:
        result = config.grown(on_gpus if device_type == "cuda" else len(found), device_type)
    except ValueError as error:
        raise RuntimeError(str(error)) from error
    names = ", ".join(map(str, found))
    logger.info("the cluster's machines are %s: %d workers on %s", names, result.world_size, device_type)
    return result


def _bundle(device_type: str, gpu_select: tuple[int, ...] = ()) -> dict[str, float]:
    """Return what one worker needs of Ray's resources."""
    return {"CPU": 1.0} | ({"GPU": 1.0} if device_type == "cuda" and not gpu_select else {})


def _reserve_here(
    config: SessionConfig, bundle: Mapping[str, float], wants_cancel: Callable[[], bool]
) -> PlacementGroup:
    group = placement_group([dict(bundle) for _ in range(config.world_size)], strategy="PACK")
    deadline = time.monotonic() + _LOCAL_S
    while not group.wait(timeout_seconds=_POLL_S):
        if wants_cancel():
            remove_placement_group(group)
            raise RunCancelled
        never = any(ray.cluster_resources().get(name, 0) < count * config.world_size for name, count in bundle.items())
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


def _reserve(config: SessionConfig, bundle: Mapping[str, float], wants_cancel: Callable[[], bool]) -> PlacementGroup:
    """Reserve on machines of a cluster that answer. Wait for what others use, and a while for more machines."""
    began = time.monotonic()
    while True:
        found, free = with_timeout(machines.alive_and_free, machines.LIST_S, machines.LIST)
        assigned = machines.assign([machines.workers_on(free[one.node], bundle) for one in found], config.mesh)
        if assigned is not None:
            places = [found[index] for index in assigned]
            group = _reserve_on(places, bundle, wants_cancel)
            if group is not None:
                _note(config, places)
                return group
        in_all = sum(machines.workers_on(one.resources, bundle) for one in found)
        waited_s = time.monotonic() - began
        if waited_s > config.start_timeout_s or (in_all < config.world_size and waited_s > _GROW_S):
            have = "; ".join(f"{one} has {_counts(free[one.node], bundle)} free" for one in found)
            raise RuntimeError(
                f"{config.world_size} workers need {_counts(bundle, bundle)} each, and the cluster has room for "
                f"{in_all} when nothing else uses it. Machines that answer: {have or 'none'}. Lower GPU (0 takes what "
                f"is there), free what uses them, or add a machine"
            )
        _pause(_LOOK_S, wants_cancel)


def _pause(seconds: float, wants_cancel: Callable[[], bool]) -> None:
    """Wait. Raises RunCancelled: when cancelled."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if wants_cancel():
            raise RunCancelled
        time.sleep(_POLL_S)


def _reserve_on(
    places: list[machines.Machine], bundle: Mapping[str, float], wants_cancel: Callable[[], bool]
) -> PlacementGroup | None:
    """Reserve for each rank on its machine; None if something else was faster."""
    group = placement_group([{**bundle, place.resource: _PINNED} for place in places], strategy="PACK")
    deadline = time.monotonic() + _CLUSTER_S
    while not group.wait(timeout_seconds=_POLL_S):
        cancelled = wants_cancel()
        if cancelled or time.monotonic() > deadline:
            remove_placement_group(group)
            if cancelled:
                raise RunCancelled
            return None
    return group


def _note(config: SessionConfig, places: list[machines.Machine]) -> None:
    """Log how the ranks are spread, and warn where Ulysses exchanges over the network."""
    if len(set(places)) == 1:
        return
    logger.info("ranks by machine: %s", ", ".join(f"{rank} on {place}" for rank, place in enumerate(places)))
    if not config.by_run and machines.splits_ulysses(places, config.mesh):
        logger.warning(
            "ulysses_degree = %d goes over the network, as no machine has room for so many workers: ring_degree, "
            "cfg_degree, dp_degree or FSDP send less there, or degrees of 0",
            config.mesh.ulysses,
        )


def _counts(resources: Mapping[str, float], names: Iterable[str]) -> str:
    counts = {name: f"{resources.get(name, 0):g}" for name in sorted(names, reverse=True)}
    return " and ".join(f"{count} {name}{'' if count == '1' else 's'}" for name, count in counts.items())


def environment(config: SessionConfig, service: ServiceSpec) -> dict[str, str]:
    """Return the environment variables that all ranks' processes start with."""
    path = [*service.python_path, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    if not config.is_local:
        # Ray replaces it on each machine: one that was started by `raylight.cluster.node` names its own folders.
        path.insert(0, f"${{{PATH_VARIABLE}}}")
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


def start_actors(config: SessionConfig, group: PlacementGroup, environment: Mapping[str, str]) -> Iterator[Any]:
    """Have Ray start the process of each rank where `group` has reserved for it, with these variables besides Ray's
    own. Yield the ranks' actors.
    """
    runtime_env: dict[str, Any] = {"env_vars": dict(environment)} if environment else {}
    if config.is_local and RUNTIME.worker_command is not None:
        runtime_env["py_executable"] = RUNTIME.worker_command
    groups, bundle = {"control": 2, "watch": 1}, _bundle(config.device_type, config.gpu_select)
    actor = ray.remote(max_restarts=0, concurrency_groups=groups)(RankActor)  # pyright: ignore[reportCallIssue]
    for rank in range(config.world_size):
        options = actor.options(
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
            **({"runtime_env": runtime_env} if runtime_env else {}),
        )
        log_level, of_rank = logging.getLogger().level, _gpu_environment(config, rank)
        yield options.remote(rank, config.world_size, config.device_type, log_level, of_rank)


def release(actors: Iterable[Any], group: PlacementGroup | None) -> None:
    """End the ranks' processes, and what is reserved for them."""
    for actor in actors:
        ray.kill(actor)
    if group is not None:
        remove_placement_group(group)


def _gpu_environment(config: SessionConfig, rank: int) -> dict[str, str]:
    """Return the environment variables by which a rank sees its GPU only, none if Ray sets them."""
    if not config.gpu_select:
        return {}
    return ray_environment.select_gpu(config.gpu_select[rank], os.environ, torch.version.hip is not None)
