"""The machines of a Ray cluster, and which of them gets which rank."""

from __future__ import annotations

import math
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby

import ray

from raylight.parallel.mesh import MeshShape

LIST, LIST_S = "Ray's list of the cluster's machines", 10.0  # and how long it may take
_ANSWER_S = 2.0
_PROBES = 32  # machines that are asked at once


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine of the cluster: Ray's id for it, its name and address, the port of its raylet, and the resources that
    it has in all.
    """

    node: str
    name: str
    address: str
    port: int
    resources: Mapping[str, float] = field(default_factory=dict, compare=False)

    @property
    def resource(self) -> str:
        """The resource by which Ray places something on this machine and no other."""
        return f"node:{self.address}"

    def answers(self, timeout_s: float = _ANSWER_S) -> bool:
        """Return whether Ray's process listens there. Ray itself takes half a minute to find out."""
        try:
            with socket.create_connection((self.address, self.port), timeout=timeout_s):
                return True
        except OSError:
            return False

    def __str__(self) -> str:
        return f"{self.name} ({self.address})"


def known() -> list[Machine]:
    """Return the machines of the cluster that Ray takes for alive."""
    return [
        Machine(
            one["NodeID"],
            one["NodeManagerHostname"],
            one["NodeManagerAddress"],
            one["NodeManagerPort"],
            one["Resources"],
        )
        for one in ray.nodes()
        if one["Alive"]
    ]


def alive() -> list[Machine]:
    """Return the machines of the cluster that answer now, this one first, then those with most GPUs and CPUs."""
    own, of_ray = ray.get_runtime_context().get_node_id(), known()
    with ThreadPoolExecutor(_PROBES) as pool:
        answers = list(pool.map(Machine.answers, of_ray))
    answering = [machine for machine, answered in zip(of_ray, answers, strict=True) if answered]
    return sorted(
        answering,
        key=lambda one: (one.node != own, -one.resources.get("GPU", 0), -one.resources.get("CPU", 0), one.address),
    )


def alive_and_free() -> tuple[list[Machine], dict[str, dict[str, float]]]:
    """Return `alive`, and what is free on each machine, by node. What Ray does not know yet is nothing."""
    from ray._private.state import available_resources_per_node

    found, free = alive(), available_resources_per_node()
    return found, {machine.node: dict(free.get(machine.node, {})) for machine in found}


def workers_on(resources: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    """Return how many workers that need a `bundle` of resources each have room in these."""
    return int(min(resources.get(name, 0) // need for name, need in bundle.items()))


def assign(room: Sequence[int], mesh: MeshShape) -> list[int] | None:
    """Return the index of the machine of each rank, by the number of workers that each has room for; None if there is
    not enough.

    All ranks go to one machine if one has room. Else machines get whole sequence groups, or whole Ulysses groups, as
    far as they fit: Ulysses exchanges most, a ring less, and the batch axis nothing within a forward. Machines that
    come first are preferred, and ranks of one machine are next to each other.
    """
    world_size = mesh.world_size
    for whole in (world_size, mesh.ring * mesh.ulysses, mesh.ulysses, 1):
        groups = [count // whole for count in room]
        if sum(groups) * whole >= world_size:
            return [index for index, count in enumerate(groups) for _ in range(count * whole)][:world_size]
    return None


def fast_ranks(machines: Sequence[object]) -> int:
    """Return how many ranks, next to each other, share a machine in every group of as many; 0 if all share one.

    `machines` has that of each rank.
    """
    runs = [len(list(same)) for _, same in groupby(machines)]
    return 0 if len(runs) < 2 else math.gcd(*runs)


def splits_ulysses(machines: Sequence[object], mesh: MeshShape) -> bool:
    """Return whether some Ulysses group is on several machines."""
    return any(
        len(set(machines[start : start + mesh.ulysses])) > 1 for start in range(0, mesh.world_size, mesh.ulysses)
    )
