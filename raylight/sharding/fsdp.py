"""Shard a model's weights: each transformer block is a unit that is gathered when it runs, and so is the rest of the
model.

Zhao et al., 2023, "PyTorch FSDP"; the idea is ZeRO-3 (Rajbhandari et al., 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .assign import set_parameter, set_tensor
from .file_weight import FileWeight
from .gathering import Gathering
from .rows import RowSplit
from .shard_reader import ShardReader

_GATHERING = "_raylight_gathering"  # attribute of a sharded model

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


def gathering_of(model: nn.Module) -> Gathering:
    """Return what gathers the weights of a model of `shard`."""
    return getattr(model, _GATHERING)


def reset(model: nn.Module) -> None:
    """Bring a model of `shard` back to where a forward may begin, after one that failed at the same place on all ranks.
    Does nothing to a model that is not sharded.
    """
    gathering = getattr(model, _GATHERING, None)
    if gathering is not None:
        gathering.reset()


def keep_steady(model: nn.Module, on: bool, drop_graphs: Callable[[], None] = lambda: None) -> None:
    """Let forwards of a model of `shard` gather the same whatever ran before, as `Gathering.keep_steady`, or no longer.
    Does nothing to a model that is not sharded.
    """
    gathering = getattr(model, _GATHERING, None)
    if gathering is not None:
        gathering.keep_steady(on, drop_graphs)


def gathered_in_step(model: nn.Module) -> AbstractContextManager[Callable[[], None]]:
    """As `Gathering.in_step` of a model of `shard`."""
    return gathering_of(model).in_step()


def announce_to(model: nn.Module) -> Callable[..., AbstractContextManager[bool]] | None:
    """Return `Gathering.announced` of a model of `shard`; None for a model that is not sharded."""
    gathering = getattr(model, _GATHERING, None)
    return None if gathering is None else gathering.announced


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
    split: RowSplit | None = None,
) -> ShardReport:
    """Shard the weights of `model` over a one-dimensional mesh, in place. Collective.

    The model's parameters give shapes and dtypes and may be on `meta`; `weights` give their values by name, of the same
    shapes and any dtype. A parameter (weight rows, ...) is sharded along dim 0 by `split`, evenly by default, and each
    rank reads its rows only. Parameters with one dimension or fewer rows than ranks are replicated, and so are buffers.
    A block's parameters may be of several dtypes. With `offload` the shards stay in host memory, pinned if `device` is
    a GPU, and must be even. `methods` of the model that are called outside of its forward gather what `forward`
    gathers.

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
    members: dict[str, list[str]] = {unit: [] for unit in (*blocks, "")}
    for name in (name for name, _ in model.named_parameters() if name not in replicated):
        members[next((unit for unit in blocks if name.startswith(f"{unit}.")), "")].append(name)
    reader = ShardReader(model, weights, mesh, split or RowSplit.over(mesh), device, offload)
    of_units = {unit: reader.read(names) for unit, names in members.items()}
    rest = of_units.pop("")
    gathered = [(blocks[unit], of_unit) for unit, of_unit in of_units.items()]
    setattr(model, _GATHERING, Gathering(model, gathered, rest, mesh.get_group(), device, methods))
    replicated_bytes = sum(model.get_parameter(name).nbytes for name in replicated)
    host_bytes = replicated_bytes + (reader.nbytes if offload or device.type == "cpu" else 0)
    return ShardReport(len(blocks) + 1, reader.nbytes, replicated_bytes, model_bytes, host_bytes)


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
