"""Reads a rank's rows of sharded weights from their file, to where units gather them from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from raylight.parallel.heartbeat import cancellation_point

from .alignment import aligned
from .assign import set_parameter
from .file_weight import FileWeight
from .pinned import PinnedBuffer
from .rows import RowSplit
from .unit_weights import ALIGNMENT, ShardedWeight, UnitWeights, cut


class ShardReader:
    """Reads units of one model in turn. `nbytes` counts this rank's rows of what was read."""

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        mesh: DeviceMesh,
        split: RowSplit,
        device: torch.device,
        offload: bool,
    ) -> None:
        """`weights` give the values of the model's parameters by name. With `offload`, rows stay in system memory, and
        `split` must be even.
        """
        assert split.is_even or not offload, "offloaded rows are split evenly"
        self._model, self._weights, self._mesh, self._split = model, weights, mesh, split
        self._device, self._offload = device, offload
        self.nbytes = 0

    def read(self, names: Sequence[str]) -> UnitWeights:
        """Let these parameters be DTensors of this rank's rows, and return them as one unit."""
        like = {name: self._model.get_parameter(name) for name in names}
        shapes = {name: (self._room_rows(one.shape[0]), *one.shape[1:]) for name, one in like.items()}
        flat, rooms = None, {}
        if self._offload and names:
            sizes = [torch.Size(shape).numel() * like[name].element_size() for name, shape in shapes.items()]
            flat = self._room(sum(aligned(size, ALIGNMENT) for size in sizes))
            rooms = dict(zip(names, cut(flat, sizes), strict=True))
        members = []
        for name, parameter in like.items():
            cancellation_point()
            owner, _, leaf = name.rpartition(".")
            padded = self._padded(name, parameter, shapes[name], rooms.get(name))
            members.append(ShardedWeight(self._model.get_submodule(owner), leaf, parameter.shape, padded))
        if flat is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # copies to the host end before others begin from it
        return UnitWeights(members, self._split, flat)

    def _room_rows(self, count: int) -> int:
        """Return for how many rows of `count` this rank has room: as many as the first, if they are split evenly."""
        sizes = self._split.sizes(count)
        return sizes[0] if self._split.is_even else sizes[self._split.rank]

    def _room(self, nbytes: int) -> Tensor:
        """Return system memory (nbytes,), pinned if the device is a GPU. Its values are undefined."""
        if self._device.type != "cuda":
            return torch.empty(nbytes, dtype=torch.uint8)
        return PinnedBuffer([nbytes]).take(torch.empty(nbytes, dtype=torch.uint8, device="meta"))

    def _padded(self, name: str, parameter: nn.Parameter, shape: Sequence[int], room: Tensor | None) -> Tensor:
        """Return this rank's rows of a weight, padded to `shape`, in `room` (bytes,) if there is one. What pads them is
        undefined, and never read.
        """
        rows = self._split.own(parameter.shape[0])
        weight = FileWeight.of(self._weights[name], parameter.dtype).rows(rows.start, rows.stop)
        # A copy in any case: a view of the file would change, or fault, with the file. By way of the device, which
        # converts it.
        own = weight.read(self._device)
        count = own.shape[0]
        if room is not None:
            padded = room.view(parameter.dtype).view(shape)
            padded[:count].copy_(own, non_blocking=True)
        elif count == shape[0]:
            padded = own
        else:
            padded = torch.empty(shape, dtype=parameter.dtype, device=self._device)
            padded[:count] = own
        self.nbytes += weight.nbytes
        meta = TensorMeta(parameter.shape, parameter.stride(), parameter.dtype)
        # Not by `DTensor.from_local`, which would move it to the device of the mesh.
        spec = DTensorSpec(self._mesh, (Shard(0),), tensor_meta=meta)
        set_parameter(self._model, name, DTensor(padded[:count], spec, requires_grad=False))
        return padded
