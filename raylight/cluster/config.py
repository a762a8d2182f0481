"""The configuration of a session, and of the service that its workers run."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import Any, Protocol

from raylight.parallel.mesh import MeshShape

LOCAL = "local"
ANY = "any"  # GPUs if the cluster has some, else CPUs


class Service(Protocol):
    """The object in a worker that a session calls.

    Its other methods are the verbs. Their first argument is a `Run`, and `Session.run` calls them.
    """

    def inventory(self) -> str:
        """Return in words what this rank holds in memory."""
        ...

    def spare_bytes(self) -> int:
        """Return how many bytes this rank holds only to be faster."""
        ...

    def recover(self) -> bool:
        """Get ready for the next run after an error that all ranks met. Return False if that is impossible.

        Collective.
        """
        ...


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """The service that each worker opens when it has joined the process group.

    `factory(context, settings)` returns a `Service`. `preparation(device_type, settings)` does what takes long and
    needs no other rank, such as imports. Both are named "module:function", and imported by workers only: `python_path`
    lists the folders in which they search for the modules, in order. `forked_imports` are modules that the preparation
    imports, which start neither CUDA nor threads, and `tried_imports` others that may: see `fork_server.py`.
    """

    factory: str
    settings: Any
    python_path: tuple[str, ...]
    preparation: str | None = None
    forked_imports: tuple[str, ...] = ()
    tried_imports: tuple[str, ...] = ()

    def prepare(self, device_type: str) -> None:
        """Do what `open` would otherwise have to do first."""
        if self.preparation is not None:
            _imported(self.preparation)(device_type, self.settings)

    def open(self, context: Any) -> Service:
        """Return the service of the rank that `context` describes."""
        return _imported(self.factory)(context, self.settings)


def _imported(name: str) -> Any:
    module, function = name.split(":")
    return getattr(importlib.import_module(module), function)


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """What workers are started with. Another mesh of as many ranks, and other limits, do not require new ones.

    With `by_run` the workers choose degrees for each forward (`parallel/degrees.py`); `mesh` has them all in one
    sequence then.
    `address` is "local", or that of a running cluster. `gpu_select` are indices of this machine's GPUs, empty for any.
    `object_store_bytes` None leaves the size to Ray. `check_links`: measure the links between the workers before their
    first use. A rank has hung if it sends no report for `heartbeat_timeout_s`, or if all ranks make no progress for
    `stall_timeout_s`.

    In a cluster the device type may be `ANY`. With an axis `grows`, the mesh is the least, and along this axis it has
    as many workers as the machines have room for that answer when they start: `as_in` returns what a session has.
    """

    mesh: MeshShape
    device_type: str
    address: str = LOCAL
    namespace: str = "default"
    gpu_select: tuple[int, ...] = ()
    object_store_bytes: int | None = None
    start_timeout_s: float = 180.0
    collective_timeout_s: float = 600.0
    heartbeat_timeout_s: float = 60.0
    stall_timeout_s: float = 600.0
    check_links: bool = True
    by_run: bool = False
    grows: str = ""

    def __post_init__(self) -> None:
        if self.gpu_select and len(self.gpu_select) != self.world_size:
            raise ValueError(
                f"GPU_SELECT names {len(self.gpu_select)} GPUs ({', '.join(map(str, self.gpu_select))}) "
                f"for {self.world_size} workers: name one for each, or none"
            )
        if len(set(self.gpu_select)) != len(self.gpu_select):
            raise ValueError(f"GPU_SELECT names a GPU twice: {', '.join(map(str, self.gpu_select))}")
        if self.gpu_select and self.address != LOCAL:
            raise ValueError("GPU_SELECT works with ray_cluster_address = local only: a cluster places its own workers")

    @property
    def world_size(self) -> int:
        """The number of workers."""
        return self.mesh.world_size

    def can_become(self, other: SessionConfig) -> bool:
        """Return whether the same workers can have another configuration: another mesh, or other limits of time.

        `other` is one of `as_in`, or equal to it.
        """
        return other.world_size == self.world_size and self == replace(
            other,
            mesh=self.mesh,
            by_run=self.by_run,
            check_links=self.check_links,
            start_timeout_s=self.start_timeout_s,
            heartbeat_timeout_s=self.heartbeat_timeout_s,
            stall_timeout_s=self.stall_timeout_s,
        )

    @property
    def is_open(self) -> bool:
        """Whether a cluster is to decide on the number of workers, or on their devices."""
        return bool(self.grows) or self.device_type == ANY

    @property
    def may_split_tokens(self) -> bool:
        """Whether several ranks may split the tokens of a run, be it when a cluster has room for them."""
        return self.mesh.ring * self.mesh.ulysses > 1 or self.grows == "ulysses"

    def grown(self, world_size: int, device_type: str) -> SessionConfig:
        """Return this configuration on at most so many workers, on devices of this type. What was open is decided.

        Raises ValueError: when the least mesh has more workers.
        """
        times = world_size // self.mesh.world_size if self.grows else 1
        if times < 1:
            raise ValueError(
                f"the degrees make {self.mesh.world_size} workers at least, and the machines of the cluster that "
                f"answer have room for {world_size}: lower the degrees, or add a machine"
            )
        mesh = replace(self.mesh, **{self.grows: getattr(self.mesh, self.grows) * times}) if self.grows else self.mesh
        by_run = self.by_run and mesh.world_size > 1
        return replace(self, mesh=mesh, device_type=device_type, by_run=by_run, grows="")

    def as_in(self, other: SessionConfig) -> SessionConfig:
        """Return this configuration, with what is open in it as a session of `other` has it, if that is possible."""
        device_type = other.device_type if self.device_type == ANY else self.device_type
        if not self.is_open or (self.grows and other.world_size < self.mesh.world_size):
            return self
        return self.grown(other.world_size, device_type)

    @property
    def is_local(self) -> bool:
        """Whether the workers run in a Ray that is started on this machine."""
        return self.address == LOCAL
