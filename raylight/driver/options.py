"""From an initializer's inputs to a description of the workers, or a refusal."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import torch

from raylight.attention import kernels
from raylight.cluster.config import ANY, LOCAL, SessionConfig
from raylight.host.recipe import OFFLOADED, REPLICATED, SHARDED, WorkerConfig
from raylight.parallel import external_strategies, graphs
from raylight.parallel.mesh import MeshShape

logger = logging.getLogger(__name__)

AUTOMATIC = 0
MOST = 64
CPU_WORKERS = 2  # on a machine without a GPU, to try things out

_CUDA, _CPU = "cuda", "cpu"
_GROWING = {"ulysses_degree": "ulysses", "dp_degree": "batch"}
_ACCELERATORS = {
    "xpu": "an Intel GPU (xpu)",
    "mps": "an Apple GPU (mps)",
    "npu": "an Ascend NPU (npu)",
    "mlu": "a Cambricon MLU (mlu)",
    "privateuseone": "DirectML",
}
# Inputs of saved workflows that have no effect, and their defaults.
_IGNORED = {
    "sync_ulysses": False,
    "use_mmap": False,
    "ray_dashboard_address": "None",
    "torch_dist_address": "127.0.0.1:29500",
}


def device_type() -> str:
    """Return "cuda" for NVIDIA and for AMD by ROCm, or "cpu" if ComfyUI was started with --cpu.

    Raises ValueError if ComfyUI uses an accelerator that workers cannot.
    """
    found = comfy.model_management.get_torch_device().type
    if found not in (_CUDA, _CPU):
        raise ValueError(
            f"ComfyUI computes on {_ACCELERATORS.get(found, found)} here, and Raylight has workers for NVIDIA and AMD "
            f"(ROCm) GPUs only: use ComfyUI's own loaders and samplers on this machine. To try Raylight with workers "
            f"on the CPU, start ComfyUI with --cpu"
        )
    return found


def gpu_count() -> int:
    """Return the number of GPUs that workers on this machine can have. Raises as `device_type`."""
    return torch.cuda.device_count() if device_type() == _CUDA else 0


def default_worker_count() -> int:
    """Return the number of GPUs of this machine, or CPU_WORKERS if it has none. Raises as `device_type`."""
    return gpu_count() or CPU_WORKERS


@dataclass(frozen=True, slots=True)
class Degrees:
    """Degrees of parallelism, whose product is the number of workers. `chosen` names the inputs that were left to
    Raylight. With `of_cluster` the product is the least number: a cluster may have room for more.
    """

    ulysses: int
    ring: int = 1
    cfg: int = 1
    dp: int = 1
    chosen: tuple[str, ...] = ()
    of_cluster: bool = False

    @property
    def grows(self) -> str:
        """The axis along which the workers of a cluster are as many as it has room for, "" if their number is given."""
        if not self.of_cluster:
            return ""
        return next((axis for name, axis in _GROWING.items() if name in self.chosen), "")

    @property
    def mesh(self) -> MeshShape:
        return MeshShape(self.cfg * self.dp, self.ring, self.ulysses)

    @property
    def by_run(self) -> bool:
        """Whether the workers choose degrees for each run: there are several, and neither `ulysses` nor groups of the
        batch axis are given. A given ring stays.
        """
        several = self.mesh.world_size > 1 or self.grows == "ulysses"
        return "ulysses_degree" in self.chosen and self.cfg * self.dp == 1 and several

    def __str__(self) -> str:
        workers = self.mesh.world_size
        kind = "GPU" if gpu_count() else "CPU worker"
        text = f"{workers} {kind}{'' if workers == 1 else 's'}: "
        if self.grows:
            text = f"all workers of the cluster, {workers} or more: "
        if self.by_run:
            text += f"ring {self.ring}, other degrees by the run" if self.ring > 1 else "degrees by the run"
        else:
            names = ("ulysses", *(name for name in ("ring", "cfg", "dp") if getattr(self, name) > 1))
            text += " x ".join(f"{name} {getattr(self, name)}" for name in names)
        return text + (f" ({' and '.join(self.chosen)} chosen automatically)" if self.chosen else "")


def without_exchange(strategy: str, degrees: Degrees) -> str:
    """Return why an exchange in 8 bits, if it is chosen, has nothing to send with these degrees, "" if it has."""
    mesh = degrees.mesh
    if strategy != external_strategies.OURS_INT8 or degrees.grows or mesh.ulysses * mesh.ring > 1:
        return ""
    if mesh.world_size == 1:
        return f"sequence_attention = {strategy} has no effect: one worker exchanges nothing"
    return (
        f"sequence_attention = {strategy} has no effect with ulysses_degree = 1 and ring_degree = 1, except for "
        f"batches that are too small for {mesh.batch} groups of workers, whose tokens are split"
    )


def check_product(*degrees: int | None) -> bool | str:
    """Return True, or why GPU and the degrees of Ulysses, ring, CFG and data parallelism do not fit together.

    Linked inputs, which are None, and a GPU of 0 are checked when the node runs. What is no number ComfyUI refuses
    itself, but asks all the same.
    """
    known = [degree for degree in degrees if isinstance(degree, int)]
    if len(known) < len(degrees):
        return True
    try:
        _check_ranges(*known)
        if known[0] != AUTOMATIC:
            _settle(*known)
    except ValueError as error:
        return str(error)
    return True


def degrees_from(inputs: Mapping[str, Any], selected: tuple[int, ...] = ()) -> Degrees:
    """Return the degrees that an initializer's inputs describe; `selected` are the GPUs that it names.

    GPU = 0 uses the selected GPUs, or all of this machine (two workers if it has none); of a cluster all that its
    machines have when the workers start. ulysses_degree = 0 uses what ring_degree, cfg_degree and dp_degree leave, and
    lets each run choose if the latter two are 1; dp_degree = 0 uses what a given ulysses_degree leaves as well.

    Raises ValueError, naming input, value and what would fit.
    """
    workers, ulysses, ring, cfg, dp = (
        inputs[name] if name == "GPU" else inputs.get(name, 1)
        for name in ("GPU", "ulysses_degree", "ring_degree", "cfg_degree", "dp_degree")
    )
    _check_ranges(workers, ulysses, ring, cfg, dp)
    automatic = workers == AUTOMATIC
    if automatic and _address(inputs) != LOCAL:
        least = ring * cfg * (dp or 1) * (ulysses or 1)
        return replace(_settle(least, ulysses, ring, cfg, dp, automatic=True), of_cluster=True)
    if automatic:
        workers = len(selected) or default_worker_count()
    return _settle(workers, ulysses, ring, cfg, dp, automatic=automatic)


def _check_ranges(workers: int, ulysses: int, ring: int, cfg: int, dp: int) -> None:
    # ComfyUI does not check the range of an input that a node's own validation names.
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


def _settle(workers: int, ulysses: int, ring: int, cfg: int, dp: int, *, automatic: bool = False) -> Degrees:
    """Fill in the degrees that are AUTOMATIC; `automatic` says that the number of workers was. Raises ValueError naming
    the product that is wrong, and what would fit.
    """
    chosen = ("GPU",) if automatic else ()
    gpu = f"GPU = {workers}" + (" (all that are there)" if automatic else "")
    if ulysses == AUTOMATIC:
        dp = dp or 1
        ulysses = _quotient(workers, gpu, ring_degree=ring, cfg_degree=cfg, dp_degree=dp)
        chosen += ("ulysses_degree",)
    elif dp == AUTOMATIC:
        dp = _quotient(workers, gpu, ulysses_degree=ulysses, ring_degree=ring, cfg_degree=cfg)
        chosen += ("dp_degree",)
    elif (product := ulysses * ring * cfg * dp) != workers:
        made = _product(ulysses_degree=ulysses, ring_degree=ring, cfg_degree=cfg, dp_degree=dp)
        wrong = f"{made}, but {gpu}: set ulysses_degree to 0 (automatic)"
        if cfg > 1 or dp > 1:
            raise ValueError(f"{wrong}, or the degrees so that their product is {workers}, or GPU to {product}")
        fitting = " or ".join(f"{workers // n} and {n}" for n in range(1, workers + 1) if workers % n == 0)
        raise ValueError(
            f"{wrong}, or ulysses_degree and ring_degree to {fitting}, or GPU to {product}. Or raise cfg_degree or "
            f"dp_degree to use the others"
        )
    return Degrees(ulysses, ring, cfg, dp, chosen)


def _quotient(workers: int, gpu: str, **degrees: int) -> int:
    product = math.prod(degrees.values())
    if workers % product:
        raise ValueError(
            f"{_product(**degrees)}, but {gpu}: change the degrees so that their product divides {workers}, or GPU to "
            f"{product}"
        )
    return workers // product


def _product(**degrees: int) -> str:
    kept = {name: value for name, value in degrees.items() if value > 1 or name in ("ulysses_degree", "ring_degree")}
    factors = " x ".join(f"{name} = {value}" for name, value in kept.items())
    return f"{factors} makes {math.prod(kept.values())} workers"


def workers_from(inputs: Mapping[str, Any]) -> tuple[WorkerConfig, Degrees]:
    """Return the workers that an initializer's inputs describe, and their degrees.

    Raises ValueError naming the input, its value and what would fit; and as `device_type`.
    """
    config, degrees = config_from(inputs)
    logger.info("Ray initializer: %s", degrees)
    if note := without_exchange(inputs.get("sequence_attention", external_strategies.OURS), degrees):
        logger.warning("%s", note)
    ignored = [name for name, default in _IGNORED.items() if inputs.get(name, default) != default]
    if ignored:
        logger.info("these inputs of the Ray initializer have no effect: %s", ", ".join(ignored))
    workers = WorkerConfig(
        config,
        inputs["XFuser_attention"],
        bool(inputs.get("clear_vram_after_sampling")),
        inputs.get("sequence_attention", external_strategies.OURS),
        _sharding(inputs),
        inputs.get("cuda_graphs", graphs.AUTO),
    )
    return workers, degrees


def config_from(inputs: Mapping[str, Any]) -> tuple[SessionConfig, Degrees]:
    """Return what the workers of an initializer's inputs are started with, and their degrees. Raises as
    `workers_from`.
    """
    kind = device_type()
    selected = _selected_gpus(inputs)
    degrees = degrees_from(inputs, selected)
    _validate(inputs, degrees.mesh.world_size, selected)
    store_gb = inputs.get("ray_object_store_gb")
    address = _address(inputs)
    config = SessionConfig(
        mesh=degrees.mesh,
        # ComfyUI's own machine need not have a GPU.
        device_type=ANY if kind == _CPU and address != LOCAL else kind,
        address=address,
        namespace=inputs["ray_cluster_namespace"] or "default",
        gpu_select=selected,
        object_store_bytes=None if store_gb is None else int(store_gb * 1e9),
        check_links=not inputs.get("skip_comm_test", False),
        by_run=degrees.by_run,
        grows=degrees.grows,
    )
    return config, degrees


def all_workers() -> WorkerConfig:
    """Return one worker for each GPU of this machine, or CPU_WORKERS, with degrees by the run. Raises as
    `device_type`.
    """
    config, degrees = config_of_all()
    logger.info("no Ray initializer: %s", degrees)
    return WorkerConfig(config, kernels.AUTO)


def config_of_all() -> tuple[SessionConfig, Degrees]:
    """Return what `all_workers` are started with, and their degrees. Raises as `device_type`."""
    degrees = Degrees(default_worker_count(), chosen=("GPU", "ulysses_degree"))
    return SessionConfig(degrees.mesh, device_type(), by_run=degrees.by_run), degrees


def _validate(inputs: Mapping[str, Any], workers: int, selected: tuple[int, ...]) -> None:
    _sharding(inputs)
    is_local = _address(inputs) == LOCAL
    if inputs.get("XFuser_attention") is not None:
        device = torch.device(device_type()) if is_local else None
        kernels.check_kernel(inputs["XFuser_attention"], inputs["ring_degree"], device)
        external_strategies.check_strategy(
            inputs.get("sequence_attention", external_strategies.OURS),
            inputs["XFuser_attention"],
            inputs["ring_degree"],
            has_gpu=device is None or device.type == _CUDA,
        )
    count = gpu_count()
    if is_local and count:
        if workers > count:
            raise ValueError(f"GPU = {workers}, but this machine has {count}: lower GPU to {count} or less")
        beyond = [index for index in selected if index >= count]
        if beyond:
            raise ValueError(f"GPU_SELECT names GPU {beyond[0]}, but this machine has GPUs 0 to {count - 1}")
    elif selected and not count:
        raise ValueError("GPU_SELECT is set, but this machine has no GPU: leave it empty")


def _address(inputs: Mapping[str, Any]) -> str:
    address = str(inputs.get("ray_cluster_address") or "").strip()
    # ComfyUI makes the null of an API prompt "None".
    return LOCAL if address.lower() in ("", "none", LOCAL) else address


def _sharding(inputs: Mapping[str, Any]) -> str:
    fsdp, offload = inputs.get("FSDP"), inputs.get("FSDP_CPU_OFFLOAD")
    if offload and not fsdp:
        raise ValueError(
            "FSDP_CPU_OFFLOAD keeps weights that FSDP splits in system memory: switch FSDP on, or FSDP_CPU_OFFLOAD off"
        )
    if not fsdp:
        return REPLICATED
    return OFFLOADED if offload else SHARDED


def _selected_gpus(inputs: Mapping[str, Any]) -> tuple[int, ...]:
    text = (inputs.get("GPU_SELECT") or "").strip()
    indices = [index.strip() for index in text.split(",") if index.strip()]
    if not all(index.isdigit() for index in indices):
        raise ValueError(f"GPU_SELECT = {text!r}: write the indices of GPUs, such as 0,2")
    return tuple(int(index) for index in indices)
