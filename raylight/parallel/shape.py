"""The degrees of the mesh, apart from torch.distributed so that a description of it costs no import."""

from __future__ import annotations

from dataclasses import dataclass

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
