"""Shard a model's weights by FSDP2: one unit per transformer block is gathered at a time, and the rest of the model.

Zhao et al., 2023, "PyTorch FSDP"; the idea is ZeRO-3 (Rajbhandari et al., 2020).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from raylight.parallel.heartbeat import cancellation_point

from .assign import set_parameter, set_tensor
from .file_weight import FileWeight
from .pinned import PinnedBuffer
from .rows import ByteAllGather
from .shards import own_rows

SMALLEST_UNIT = 0.002  # of the model's weights: below it an all-gather of its own costs more than it saves


def units(model: nn.Module) -> dict[str, nn.Module]:
    """Return the transformer blocks of a model by name, in the order of the model.

    A block is an entry of an outermost `nn.ModuleList`, or of a list in it, with at least `SMALLEST_UNIT` of the
    weights: every DiT of ComfyUI keeps its blocks in such lists.
    """
    least = SMALLEST_UNIT * _size(model)
    return {name: block for name, block in _entries(model, "") if _size(block) >= least}


def _entries(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(module, nn.ModuleList) and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield path, child
        else:
            yield from _entries(child, f"{path}.")


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def reset(model: nn.Module) -> bool:
    """Bring a model of `shard` back to where a forward may begin, after one that failed at the same place on all ranks:
    wait for collectives that they have begun, and free what was gathered.

    Return False if this version of PyTorch cannot do that: the model must not be used any more. Return True for a model
    that is not sharded.
    """
    if not isinstance(model, FSDPModule) or _is_at_rest(model):
        return True
    if not hasattr(model, "reset_iter_state"):
        return False
    model.reset_iter_state()
    return _is_at_rest(model)


def _is_at_rest(model: nn.Module) -> bool:
    """Return whether no module is within a forward or has begun to gather, by FSDP2's private state. False if this
    version has other names for it.
    """
    unknown = object()
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        state = module._get_fsdp_state()
        for one in (state, *_groups(state)):
            if getattr(getattr(one, "_training_state", None), "name", "") != "IDLE":
                return False
        if any(getattr(group, "_all_gather_result", unknown) is not None for group in _groups(state)):
            return False
    return True


def _groups(state: Any) -> Iterator[Any]:
    if hasattr(state, "_fsdp_param_groups"):  # since PyTorch 2.12
        yield from state._fsdp_param_groups
    elif (group := getattr(state, "_fsdp_param_group", None)) is not None:
        yield group


@dataclass(frozen=True, slots=True)
class ShardReport:
    """How many units there are, and the bytes of this rank's shards, of the tensors that every rank holds in full, of
    the full model, and of what is in this rank's system memory when no weight is on a GPU.
    """

    units: int
    sharded_bytes: int
    replicated_bytes: int
    model_bytes: int
    host_bytes: int

    @property
    def bytes(self) -> int:
        """All bytes of weights on this rank."""
        return self.sharded_bytes + self.replicated_bytes


def shard(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    mesh: DeviceMesh,
    device: torch.device,
    offload: bool = False,
    methods: Iterable[str] = (),
) -> ShardReport:
    """Shard the weights of `model` over a one-dimensional mesh, in place. Collective.

    The model's parameters give shapes and dtypes and may be on `meta`; `weights` give their values by name, of the same
    shapes and any dtype. A parameter (weight rows, ...) is sharded along dim 0 as by `rows_of`, and each rank reads its
    rows only. Parameters with one dimension or fewer rows than ranks are replicated, and so are buffers. A block's
    parameters may be of several dtypes. With `offload` the shards stay in host memory, pinned if `device` is a GPU.
    `methods` of the model that are called outside of its forward gather what `forward` gathers.

    Raises ValueError: when a weight is missing or has another shape; the message names it.
    """
    _check(model, weights)
    blocks = units(model)
    replicated = _replicated(model, mesh.size())
    model_bytes = sum(parameter.nbytes for parameter in model.parameters())
    for name, parameter in list(model.named_parameters()):
        value = torch.empty_like(parameter, device="meta")
        if name in replicated:
            value = FileWeight.of(weights[name], parameter.dtype).read(device)
        set_parameter(model, name, value)
    for name, buffer in list(model.named_buffers()):
        set_tensor(model, name, buffer.detach().to(device))  # a buffer can be made of a parameter, in PixArt
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    ignored = {model.get_parameter(name) for name in replicated}
    for module in (*blocks.values(), model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, offload_policy=policy, ignored_params=ignored)
    for method in methods:
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)
    sharded_bytes = _fill(model, weights, mesh, device, offload)
    # Shards on the host are copied to the GPU on a stream of their own, while a block computes.
    stream = torch.cuda.Stream(device) if offload and device.type == "cuda" else None
    _prefetch(model, list(blocks.values()), stream)
    for module in (*blocks.values(), model):
        _gather_as_bytes(module)
    replicated_bytes = sum(parameter.nbytes for parameter in ignored)
    host_bytes = replicated_bytes + (sharded_bytes if offload or device.type == "cpu" else 0)
    return ShardReport(len(blocks) + 1, sharded_bytes, replicated_bytes, model_bytes, host_bytes)


def move(model: nn.Module, device: torch.device) -> None:
    """Move what is replicated of a sharded model to a device."""
    for name, parameter in list(model.named_parameters()):
        if not isinstance(parameter, DTensor):
            set_parameter(model, name, parameter.to(device))
    for name, buffer in list(model.named_buffers()):
        set_tensor(model, name, buffer.to(device))


def _check(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name not in weights:
            raise ValueError(f"the tensor {name} is missing")
        if weights[name].shape != parameter.shape:
            raise ValueError(
                f"the tensor {name} is {tuple(weights[name].shape)}, and the model wants {tuple(parameter.shape)}"
            )


def _replicated(model: nn.Module, world_size: int) -> frozenset[str]:
    """Return the names of the parameters that every rank holds in full: too few rows to shard, or not worth it."""
    return frozenset(
        name for name, parameter in model.named_parameters() if parameter.ndim < 2 or parameter.shape[0] < world_size
    )


def _fill(
    model: nn.Module, weights: Mapping[str, Tensor], mesh: DeviceMesh, device: torch.device, offload: bool
) -> int:
    """Read this rank's rows of each sharded parameter; return their bytes."""
    rows = own_rows(model, weights, mesh)
    pinned = PinnedBuffer([one.nbytes for one in rows.values()]) if offload and device.type == "cuda" else None
    for name, weight in rows.items():
        cancellation_point()
        parameter: Any = model.get_parameter(name)
        # A copy in any case: a view of the file would change, or fault, with the file. By way of the device, which
        # converts it.
        local = weight.read(device)
        if pinned is not None:
            local = pinned.take(local).copy_(local, non_blocking=True)
        # Not by `DTensor.from_local`, which would move it to the device of the mesh.
        set_parameter(model, name, DTensor(local, parameter._spec, requires_grad=False))
    if pinned is not None:
        torch.cuda.synchronize(device)  # copies to the host end before others begin from it
    return sum(one.nbytes for one in rows.values())


def _prefetch(model: nn.Module, blocks: list[nn.Module], stream: torch.cuda.Stream | None) -> None:
    """Start to gather each block when the one before it, or the model, begins; on `stream` if there is one.

    So the GPU holds the block that computes and the next one. FSDP2's own `set_modules_to_forward_prefetch` keeps what
    it gathered for a block longer, next to its copy.
    """
    for module, following in zip((model, *blocks), blocks, strict=False):
        module.register_forward_pre_hook(functools.partial(_gather_ahead, following, stream))


def _gather_ahead(following: nn.Module, stream: torch.cuda.Stream | None, *_: Any) -> None:
    assert isinstance(following, FSDPModule)
    if stream is None:
        following.unshard(async_op=True)
        return
    # What was gathered before is in this stream's memory, and may still be being copied out of it.
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        following.unshard(async_op=True)


def _gather_as_bytes(module: nn.Module) -> None:
    eight_bits = any(
        isinstance(parameter, DTensor) and parameter.is_floating_point() and parameter.itemsize == 1
        for parameter in module.parameters()
    )
    # An older PyTorch has no such option; its NCCL may know the dtype.
    set_all_gather = getattr(module, "set_custom_all_gather", None)
    if eight_bits and set_all_gather is not None:
        set_all_gather(ByteAllGather())
