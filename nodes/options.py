"""From the initializer's inputs to a description of workers, with every refusal in one place."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch

from raylight.attention import kernels
from raylight.cluster.config import LOCAL, SessionConfig
from raylight.host.handles import Workers
from raylight.host.recipe import OFFLOADED, SHARDED, WHOLE
from raylight.parallel import long_context
from raylight.parallel.shape import MeshShape

logger = logging.getLogger(__name__)

WITHOUT_GPU = 2  # workers, to try things out
_IGNORED = {"sync_ulysses": False, "use_mmap": False, "ray_dashboard_address": "None",
            "torch_dist_address": "127.0.0.1:29500"}


def check_product(*degrees: int | None) -> bool | str:
    """True, or why GPU and the degrees of Ulysses, ring, CFG and data parallelism do not fit together; a linked input
    is None and is judged when the node runs."""
    if None in degrees:
        return True
    try:
        _validate_product(*degrees)
    except ValueError as error:
        return str(error)
    return True


def workers_from(inputs: Mapping[str, Any]) -> Workers:
    """The workers that the inputs describe. Raises ValueError naming the input, its value and what would fit."""
    _validate(inputs)
    ignored = [name for name, default in _IGNORED.items() if inputs.get(name, default) != default]
    if ignored:
        logger.info("these inputs of the Ray initializer have no effect: %s", ", ".join(ignored))
    address = (inputs["ray_cluster_address"] or LOCAL).strip()
    store_gb = inputs.get("ray_object_store_gb")
    config = SessionConfig(
        mesh=MeshShape(batch_degree(inputs), inputs["ring_degree"], inputs["ulysses_degree"]),
        device_type="cuda" if torch.cuda.is_available() else "cpu",
        address=address,
        namespace=inputs["ray_cluster_namespace"] or "default",
        gpu_select=_gpu_select(inputs),
        object_store_bytes=None if store_gb is None else int(store_gb * 1e9),
        check_links=not inputs.get("skip_comm_test", False),
    )
    return Workers(config, inputs["XFuser_attention"], bool(inputs.get("clear_vram_after_sampling")),
                   inputs.get("sequence_attention", long_context.OURS), _sharding(inputs))


def all_workers() -> Workers:
    """One worker for each GPU of this machine, which split the tokens; without a GPU, two workers."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else WITHOUT_GPU
    config = SessionConfig(MeshShape(ulysses=count), "cuda" if torch.cuda.is_available() else "cpu")
    return Workers(config, kernels.AUTO)


def batch_degree(inputs: Mapping[str, Any]) -> int:
    """How many groups of workers share out a batch: cfg_degree x dp_degree, where a dp_degree of 0 is what is left."""
    cfg, dp = inputs.get("cfg_degree", 1), inputs.get("dp_degree", 1)
    return cfg * (dp or max(1, inputs["GPU"] // (inputs["ulysses_degree"] * inputs["ring_degree"] * cfg)))


def _validate_product(workers: int, ulysses: int, ring: int, cfg: int = 1, dp: int = 1) -> None:
    """Raises ValueError naming the product that is wrong, and degrees that would fit; a `dp` of 0 is what is left."""
    for name, value in (("GPU", workers), ("ulysses_degree", ulysses), ("ring_degree", ring), ("cfg_degree", cfg)):
        if value < 1:
            raise ValueError(f"{name} = {value}: at least 1")
    degrees = {"ulysses_degree": ulysses, "ring_degree": ring}
    degrees |= {name: value for name, value in (("cfg_degree", cfg), ("dp_degree", dp)) if value > 1}
    product = math.prod(degrees.values())
    if workers == product or (dp == 0 and workers % product == 0):
        return
    written = " x ".join(f"{name} = {value}" for name, value in degrees.items())
    if len(degrees) > 2 or dp == 0:
        raise ValueError(f"{written} makes {product} workers, but GPU = {workers}: change the degrees so that their "
                         f"product {'divides' if dp == 0 else 'is'} {workers}, or GPU to {product}")
    fitting = " or ".join(f"{workers // n} and {n}" for n in range(1, workers + 1) if workers % n == 0)
    raise ValueError(f"{written} makes {product} workers, but GPU = {workers}: set ulysses_degree and ring_degree to "
                     f"{fitting}, or GPU to {product}. Or let cfg_degree or dp_degree take the others")


def _validate(inputs: Mapping[str, Any]) -> None:
    workers = inputs["GPU"]
    _validate_product(workers, inputs["ulysses_degree"], inputs["ring_degree"], inputs.get("cfg_degree", 1),
                      inputs.get("dp_degree", 1))
    _sharding(inputs)
    if inputs.get("XFuser_attention") is not None:
        local = inputs.get("ray_cluster_address", LOCAL) == LOCAL
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if local else None
        kernels.check_available(inputs["XFuser_attention"], inputs["ring_degree"], device)
        long_context.check_available(inputs.get("sequence_attention", long_context.OURS), inputs["XFuser_attention"],
                                     inputs["ring_degree"], has_gpu=device is None or device.type == "cuda")
    selected = _gpu_select(inputs)
    if inputs.get("ray_cluster_address", LOCAL) == LOCAL and torch.cuda.is_available():
        there = torch.cuda.device_count()
        if workers > there:
            raise ValueError(f"GPU = {workers}, but this machine has {there}: lower GPU to {there} or less")
        beyond = [index for index in selected if index >= there]
        if beyond:
            raise ValueError(f"GPU_SELECT names GPU {beyond[0]}, but this machine has GPUs 0 to {there - 1}")
    elif selected and not torch.cuda.is_available():
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
