"""The mesh of ranks: batch x ring x Ulysses, and the axes that combine them."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from . import graph_pool

AXES = ("batch", "ring", "ulysses")


@dataclass(frozen=True, slots=True)
class MeshShape:
    """The degrees of the mesh's axes. `ulysses` varies fastest, so its ranks are neighbours.

    Raises ValueError: when a degree is below 1.
    """

    batch: int = 1
    ring: int = 1
    ulysses: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            degree = getattr(self, axis)
            if degree < 1:
                raise ValueError(f"the {axis} degree must be at least 1, got {degree}")

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self.batch * self.ring * self.ulysses


def build_mesh(shape: MeshShape, device: torch.device) -> DeviceMesh:
    """Create the mesh over all ranks of the default process group. Collective."""
    return init_device_mesh(device.type, (shape.batch, shape.ring, shape.ulysses), mesh_dim_names=AXES)


class Meshes:
    """The meshes of one world that were used last, so that going back to one is instant.

    At most `limit`, 2 or more if one is kept: on GPUs each group that has communicated keeps some memory.
    """

    def __init__(self, device: torch.device, limit: int = 4) -> None:
        self._device, self._limit = device, limit
        self._meshes: OrderedDict[MeshShape, DeviceMesh] = OrderedDict()
        self._kept: MeshShape | None = None

    def of(self, shape: MeshShape, keep: bool = False) -> DeviceMesh:
        """Return the mesh of a shape, with all its axes. Collective.

        The mesh that was not used for longest may be ended by this: nothing may communicate over it any more. With
        `keep` this one is not ended until another is kept.
        """
        if keep:
            self._kept = shape
        if shape not in self._meshes:
            while len(self._meshes) >= self._limit:
                _end(self._meshes.pop(next(one for one in self._meshes if one != self._kept)))
            mesh = self._meshes[shape] = build_mesh(shape, self._device)
            for axis in (world_axis, outer_axis, sequence_axis):
                axis(mesh)
        self._meshes.move_to_end(shape)
        return self._meshes[shape]


def _end(mesh: DeviceMesh) -> None:
    """End the process groups of a mesh, except that of the world. Collective."""
    if mesh.device_type == "cuda":
        torch.cuda.synchronize()  # what a forward has sent over them may still be under way
    graph_pool.drop_all()
    groups = [mesh.get_group(axis) for axis in AXES]
    groups += [axis(mesh).get_group() for axis in (world_axis, outer_axis, sequence_axis)]
    for group in dict.fromkeys(groups):
        if group != dist.group.WORLD:
            dist.destroy_process_group(group)


def world_axis(mesh: DeviceMesh) -> DeviceMesh:
    """Return the axis of all ranks, over which weights are sharded."""
    return mesh._flatten("world")


def outer_axis(mesh: DeviceMesh) -> DeviceMesh:
    """Return the axis of ranks with the same place in their Ulysses groups: batch and ring together."""
    return mesh["batch", "ring"]._flatten("outer")


def sequence_axis(mesh: DeviceMesh) -> DeviceMesh:
    """Return the axis over which one sequence is split: ring and Ulysses together, Ulysses ranks next to each other."""
    return mesh["ring", "ulysses"]._flatten("sequence")
