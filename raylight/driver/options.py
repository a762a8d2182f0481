"""From the initializer's inputs to a description of workers, or a refusal."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch

from raylight.attention import kernels
from raylight.cluster.config import LOCAL, SessionConfig
from raylight.host.recipe import OFFLOADED, REPLICATED, SHARDED, WorkerConfig
from raylight.parallel import external_strategies
from raylight.parallel.mesh import MeshShape

_CUDA, _CPU = "cuda", "cpu"
_NAMES = {
    "xpu": "an Intel GPU (xpu)",
    "mps": "an Apple GPU (mps)",
    "npu": "an Ascend NPU (npu)",
    "mlu": "a Cambricon MLU (mlu)",
    "privateuseone": "DirectML",
}


def device_type() -> str:
    """ "cuda", for NVIDIA and for AMD by ROCm, or "cpu", where ComfyUI was started with --cpu.

    Raises ValueError where ComfyUI uses an accelerator that workers cannot."""
    found = comfy.model_management.get_torch_device().type
    if found not in (_CUDA, _CPU):
        raise ValueError(
            f"ComfyUI computes on {_NAMES.get(found, found)} here, and Raylight has workers for NVIDIA "
            f"and AMD (ROCm) GPUs only: take ComfyUI's own loaders and samplers on this machine. To try "
            f"Raylight with workers on the CPU, start ComfyUI with --cpu"
        )
    return found


def gpus() -> int:
    """How many GPUs workers of this machine can have. Raises as `device_type`."""
    return torch.cuda.device_count() if device_type() == _CUDA else 0


AUTOMATIC = 0
MOST = 64
WITHOUT_GPU = 2  # workers, to try things out


@dataclass(frozen=True, slots=True)
class Degrees:
    """Whole numbers whose product is `workers`; `chosen` names the inputs that were left to Raylight."""

    workers: int
    ulysses: int
    ring: int = 1
    cfg: int = 1
    dp: int = 1
    chosen: tuple[str, ...] = ()

    @property
    def mesh(self) -> MeshShape:
        return MeshShape(self.cfg * self.dp, self.ring, self.ulysses)

    def __str__(self) -> str:
        kind = "GPU" if gpus() else "CPU worker"
        text = f"{self.workers} {kind}{'' if self.workers == 1 else 's'}: ulysses {self.ulysses}"
        text += "".join(f" x {name} {getattr(self, name)}" for name in ("ring", "cfg", "dp") if getattr(self, name) > 1)
        return text + (f" ({' and '.join(self.chosen)} chosen automatically)" if self.chosen else "")


def check_product(*degrees: int | None) -> bool | str:
    """True, or why GPU and the degrees of Ulysses, ring, CFG and data parallelism do not fit together; a linked input
    is None and is judged when the node runs, and so is a GPU of 0."""
    if None in degrees:
        return True
    try:
        _check_ranges(*degrees)
        if degrees[0] != AUTOMATIC:
            _settled(*degrees)
    except ValueError as error:
        return str(error)
    return True


def degrees_from(inputs: Mapping[str, Any], selected: tuple[int, ...] = ()) -> Degrees:
    """The degrees that an initializer's inputs describe; `selected` are the GPUs that it names.

    GPU = 0 takes the selected GPUs, or all of this machine (two workers where it has none). ulysses_degree = 0 takes
    what ring_degree, cfg_degree and dp_degree leave; dp_degree = 0 what a given ulysses_degree leaves as well. Raises
    ValueError naming input, value and what would fit.
    """
    workers, ulysses, ring, cfg, dp = (
        inputs[name] if name == "GPU" else inputs.get(name, 1)
        for name in ("GPU", "ulysses_degree", "ring_degree", "cfg_degree", "dp_degree")
    )
    _check_ranges(workers, ulysses, ring, cfg, dp)
    automatic = workers == AUTOMATIC
    if automatic:
        address = (inputs.get("ray_cluster_address") or LOCAL).strip()
        if address != LOCAL:
            raise ValueError(
                f"GPU = 0 takes all GPUs of this machine, but ray_cluster_address = {address} names a "
                "cluster: set GPU to the number of workers to start there"
            )
        workers = len(selected) or gpus_here()
    return _settled(workers, ulysses, ring, cfg, dp, automatic)


def gpus_here() -> int:
    """The GPUs of this machine; where there is none, how many workers the CPU gets. Raises as `device_type`."""
    return gpus() or WITHOUT_GPU


def _check_ranges(workers: int, ulysses: int, ring: int, cfg: int, dp: int) -> None:
    # ComfyUI checks no range of an input that a node's own validation names.
    for name, value, least in (
        ("GPU", workers, AUTOMATIC),
        ("ulysses_degree", ulysses, AUTOMATIC),
        ("ring_degree", ring, 1),
        ("cfg_degree", cfg, 1),
        ("dp_degree", dp, AUTOMATIC),
    ):
        if not least <= value <= MOST:
            zero = ", or 0 for automatic" if least == AUTOMATIC else ""
            raise ValueError(f"{name} = {value}: at least 1 and at most {MOST}{zero}")


def _settled(workers: int, ulysses: int, ring: int, cfg: int, dp: int, automatic: bool = False) -> Degrees:
    """Raises ValueError naming the product that is wrong, and degrees that would fit."""
    open_inputs = ("GPU",) if automatic else ()
    if ulysses == AUTOMATIC:
        dp = dp or 1
        ulysses, left = divmod(workers, ring * cfg * dp)
        if left or not ulysses:
            raise ValueError(
                _does_not_divide({"ring_degree": ring, "cfg_degree": cfg, "dp_degree": dp}, workers, automatic)
            )
        return Degrees(workers, ulysses, ring, cfg, dp, (*open_inputs, "ulysses_degree"))
    product = ulysses * ring * cfg
    if dp == AUTOMATIC:
        if workers % product:
            raise ValueError(
                _does_not_divide(
                    {"ulysses_degree": ulysses, "ring_degree": ring, "cfg_degree": cfg}, workers, automatic
                )
            )
        return Degrees(workers, ulysses, ring, cfg, workers // product, (*open_inputs, "dp_degree"))
    if product * dp != workers:
        raise ValueError(
            _is_not(
                {"ulysses_degree": ulysses, "ring_degree": ring, "cfg_degree": cfg, "dp_degree": dp}, workers, automatic
            )
        )
    return Degrees(workers, ulysses, ring, cfg, dp, open_inputs)


def _does_not_divide(degrees: Mapping[str, int], workers: int, automatic: bool) -> str:
    return (
        f"{_product(degrees)}, but {_gpu(workers, automatic)}: change the degrees so that their product divides "
        f"{workers}, or GPU to {math.prod(degrees.values())}"
    )


def _is_not(degrees: Mapping[str, int], workers: int, automatic: bool) -> str:
    product = math.prod(degrees.values())
    wrong = f"{_product(degrees)}, but {_gpu(workers, automatic)}: set ulysses_degree to 0 (automatic)"
    if degrees["cfg_degree"] > 1 or degrees["dp_degree"] > 1:
        return f"{wrong}, or the degrees so that their product is {workers}, or GPU to {product}"
    fitting = " or ".join(f"{workers // n} and {n}" for n in range(1, workers + 1) if workers % n == 0)
    return (
        f"{wrong}, or ulysses_degree and ring_degree to {fitting}, or GPU to {product}. Or let cfg_degree or "
        "dp_degree take the others"
    )


def _product(degrees: Mapping[str, int]) -> str:
    kept = {name: value for name, value in degrees.items() if value > 1 or name in ("ulysses_degree", "ring_degree")}
    return (
        " x ".join(f"{name} = {value}" for name, value in kept.items()) + f" makes {math.prod(kept.values())} workers"
    )


def _gpu(workers: int, automatic: bool) -> str:
    return f"GPU = {workers}" + (" (all that are there)" if automatic else "")


logger = logging.getLogger(__name__)

_IGNORED = {
    "sync_ulysses": False,
    "use_mmap": False,
    "ray_dashboard_address": "None",
    "torch_dist_address": "127.0.0.1:29500",
}


def workers_from(inputs: Mapping[str, Any]) -> tuple[WorkerConfig, Degrees]:
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
    workers = WorkerConfig(
        config,
        inputs["XFuser_attention"],
        bool(inputs.get("clear_vram_after_sampling")),
        inputs.get("sequence_attention", external_strategies.OURS),
        _sharding(inputs),
    )
    return workers, degrees


def all_workers() -> WorkerConfig:
    """One worker for each GPU of this machine, which split the tokens; without a GPU, two workers. Raises as
    `device_type`."""
    degrees = Degrees(gpus_here(), gpus_here(), chosen=("GPU", "ulysses_degree"))
    logger.info("no Ray initializer: %s", degrees)
    config = SessionConfig(degrees.mesh, device_type())
    return WorkerConfig(config, kernels.AUTO)


def _validate(inputs: Mapping[str, Any], workers: int, selected: tuple[int, ...]) -> None:
    _sharding(inputs)
    if inputs.get("XFuser_attention") is not None:
        local = inputs.get("ray_cluster_address", LOCAL) == LOCAL
        device = torch.device(device_type()) if local else None
        kernels.check_available(inputs["XFuser_attention"], inputs["ring_degree"], device)
        external_strategies.check_available(
            inputs.get("sequence_attention", external_strategies.OURS),
            inputs["XFuser_attention"],
            inputs["ring_degree"],
            has_gpu=device is None or device.type == "cuda",
        )
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
        raise ValueError(
            "FSDP_CPU_OFFLOAD keeps weights that FSDP splits in system memory: switch FSDP on, or FSDP_CPU_OFFLOAD off"
        )
    if not inputs.get("FSDP"):
        return REPLICATED
    return OFFLOADED if inputs.get("FSDP_CPU_OFFLOAD") else SHARDED


def _gpu_select(inputs: Mapping[str, Any]) -> tuple[int, ...]:
    text = (inputs.get("GPU_SELECT") or "").strip()
    if not text:
        return ()
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdigit() for part in parts):
        raise ValueError(f"GPU_SELECT = {text!r}: write the indices of GPUs, such as 0,2")
    return tuple(int(part) for part in parts)
