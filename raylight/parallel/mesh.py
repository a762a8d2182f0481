"""The mesh of ranks: batch x ring x Ulysses, and the axes that combine them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

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


def world_axis(mesh: DeviceMesh) -> DeviceMesh:
    """Return the axis of all ranks, over which weights are sharded."""
    return mesh._flatten("world")


def outer_axis(mesh: DeviceMesh) -> DeviceMesh:
    """Return the axis of ranks with the same place in their Ulysses groups: batch and ring together."""
    return mesh["batch", "ring"]._flatten("outer")


def sequence_axis(mesh: DeviceMesh) -> DeviceMesh:
    """Return the axis over which one sequence is split: ring and Ulysses together, Ulysses ranks next to each other."""
    return mesh["ring", "ulysses"]._flatten("sequence")
