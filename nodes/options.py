"""From the initializer's inputs to a description of workers, or a refusal."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from raylight.attention import kernels
from raylight.cluster.config import LOCAL, SessionConfig
from raylight.host.handles import Workers
from raylight.host.recipe import OFFLOADED, SHARDED, WHOLE
from raylight.parallel import long_context

from .degrees import Degrees, degrees_from, gpus_here
from .device import device_type, gpus

logger = logging.getLogger(__name__)

_IGNORED = {"sync_ulysses": False, "use_mmap": False, "ray_dashboard_address": "None",
            "torch_dist_address": "127.0.0.1:29500"}


def workers_from(inputs: Mapping[str, Any]) -> tuple[Workers, Degrees]:
    """The workers that the inputs describe, and what was chosen for them where an input is 0.

    Raises ValueError naming the input, its value and what would fit; and as `device_type`.
    """
    kind = device_type()
    selected = _gpu_select(inputs)
    degrees = degrees_from(inputs, selected)
    logger.info("Ray initializer: %s", degrees)
    _validate(inputs, degrees.workers, selected)
    ignored = [name for name, default in _IGNORED.items() if inputs.get(name, default) != default]
    if ignored:
        logger.info("these inputs of the Ray initializer have no effect: %s", ", ".join(ignored))
    address = (inputs["ray_cluster_address"] or LOCAL).strip()
    store_gb = inputs.get("ray_object_store_gb")
    config = SessionConfig(
        mesh=degrees.mesh,
        device_type=kind,
        address=address,
        namespace=inputs["ray_cluster_namespace"] or "default",
        gpu_select=selected,
        object_store_bytes=None if store_gb is None else int(store_gb * 1e9),
        check_links=not inputs.get("skip_comm_test", False),
    )
    workers = Workers(config, inputs["XFuser_attention"], bool(inputs.get("clear_vram_after_sampling")),
                      inputs.get("sequence_attention", long_context.OURS), _sharding(inputs))
    return workers, degrees


def all_workers() -> Workers:
    """One worker for each GPU of this machine, which split the tokens; without a GPU, two workers. Raises as
    `device_type`."""
    degrees = Degrees(gpus_here(), gpus_here(), chosen=("GPU", "ulysses_degree"))
    logger.info("no Ray initializer: %s", degrees)
    config = SessionConfig(degrees.mesh, device_type())
    return Workers(config, kernels.AUTO)


def _validate(inputs: Mapping[str, Any], workers: int, selected: tuple[int, ...]) -> None:
    _sharding(inputs)
    if inputs.get("XFuser_attention") is not None:
        local = inputs.get("ray_cluster_address", LOCAL) == LOCAL
        device = torch.device(device_type()) if local else None
        kernels.check_available(inputs["XFuser_attention"], inputs["ring_degree"], device)
        long_context.check_available(inputs.get("sequence_attention", long_context.OURS), inputs["XFuser_attention"],
                                     inputs["ring_degree"], has_gpu=device is None or device.type == "cuda")
    there = gpus()
    if inputs.get("ray_cluster_address", LOCAL) == LOCAL and there:
        if workers > there:
            raise ValueError(f"GPU = {workers}, but this machine has {there}: lower GPU to {there} or less")
        beyond = [index for index in selected if index >= there]
        if beyond:
            raise ValueError(f"GPU_SELECT names GPU {beyond[0]}, but this machine has GPUs 0 to {there - 1}")
    elif selected and not there:
        raise ValueError("GPU_SELECT is set, but this machine has no GPU: leave it empty")


def _sharding(inputs: Mapping[str, Any]) -> str:
    if inputs.get("FSDP_CPU_OFFLOAD") and not inputs.get("FSDP"):
        raise ValueError("FSDP_CPU_OFFLOAD keeps weights that FSDP splits in system memory: switch FSDP on, or "
                         "FSDP_CPU_OFFLOAD off")
    if not inputs.get("FSDP"):
        return WHOLE
    return OFFLOADED if inputs.get("FSDP_CPU_OFFLOAD") else SHARDED


def _gpu_select(inputs: Mapping[str, Any]) -> tuple[int, ...]:
    text = (inputs.get("GPU_SELECT") or "").strip()
    if not text:
        return ()
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdigit() for part in parts):
        raise ValueError(f"GPU_SELECT = {text!r}: write the indices of GPUs, such as 0,2")
    return tuple(int(part) for part in parts)
