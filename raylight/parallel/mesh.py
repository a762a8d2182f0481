"""The degrees of the mesh, apart from torch.distributed so that a description of it costs no import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.distributed.device_mesh import init_device_mesh

AXES = ("batch", "ring", "ulysses")


@dataclass(frozen=True, slots=True)
class MeshShape:
    """Degrees of the mesh axes. `ulysses` is the fastest, so its ranks are neighbours."""

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
        return self.batch * self.ring * self.ulysses


if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh


def build_mesh(shape: MeshShape, device: torch.device) -> DeviceMesh:
    """The mesh of this world. Collective: every rank of the default process group calls it."""
    return init_device_mesh(device.type, (shape.batch, shape.ring, shape.ulysses), mesh_dim_names=AXES)


def world_axis(mesh: DeviceMesh) -> DeviceMesh:
    """All ranks as one axis: what weights are split over, whatever else the ranks share."""
    return mesh._flatten("world")


def outer_axis(mesh: DeviceMesh) -> DeviceMesh:
    """The rows of the mesh: ranks of the same place in their Ulysses group."""
    return mesh["batch", "ring"]._flatten("outer")


def sequence_axis(mesh: DeviceMesh) -> DeviceMesh:
    """The axis over which one sequence is split: ring and Ulysses together, Ulysses ranks next to each other."""
    return mesh["ring", "ulysses"]._flatten("sequence")
