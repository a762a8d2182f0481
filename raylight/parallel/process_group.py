"""The process group of all ranks, and small agreements among ranks.

Rank 0 hosts the store on a port that the system chooses, so no port is ever fixed or guessed.
"""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .heartbeat import beat


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """The address of the store at which `world_size` ranks meet. `timeout_s` limits this and every later collective."""

    host: str
    port: int
    world_size: int
    timeout_s: float

    @property
    def timeout(self) -> datetime.timedelta:
        """`timeout_s` as PyTorch takes it."""
        return datetime.timedelta(seconds=self.timeout_s)


def host_store(host: str, world_size: int, timeout_s: float) -> tuple[dist.TCPStore, Rendezvous]:
    """Open the store of a new process group on a free port of `host`. The caller, rank 0, must keep it alive."""
    # The store would listen on every interface; with a socket that is already bound it listens on `host` only.
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        host,
        port,
        world_size,
        is_master=True,
        timeout=datetime.timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, Rendezvous(host, port, world_size, timeout_s)


def join_world(rendezvous: Rendezvous, rank: int, device: torch.device, store: dist.TCPStore | None = None) -> None:
    """Make this process rank `rank` of the default process group: gloo for CPU tensors, NCCL for CUDA tensors.

    `store` is rank 0's own; other ranks connect to it. Collective.
    """
    if store is None:
        store = dist.TCPStore(
            rendezvous.host, rendezvous.port, rendezvous.world_size, is_master=False, timeout=rendezvous.timeout
        )
    # NCCL would register the buffers of a captured collective with the other ranks, and with NVLink multicast wait for
    # them to capture it too. Each rank is to decide by itself, and its peers must find the same protocol either way.
    os.environ["NCCL_GRAPH_REGISTER"] = "0"
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=rendezvous.world_size, timeout=rendezvous.timeout
    )


_among: list[dist.ProcessGroup] = []


@contextmanager
def among(group: dist.ProcessGroup) -> Iterator[None]:
    """Limit `any_rank`, `smallest` and `alike` to the ranks of `group` within this context."""
    _among.append(group)
    try:
        yield
    finally:
        _among.pop()


def any_rank(flag: bool, group: dist.ProcessGroup | None = None) -> bool:
    """Return whether `flag` is true on any rank, the same on all ranks. Collective, on the CPU."""
    return any_rank_of_each([flag], group)[0]


def any_rank_of_each(flags: Sequence[bool], group: dist.ProcessGroup | None = None) -> list[bool]:
    """Return of each flag whether it is true on any rank, by one collective, on the CPU."""
    return [agreed < 0 for agreed in smallest_of_each([-int(flag) for flag in flags], group)]


def smallest(value: int, group: dist.ProcessGroup | None = None) -> int:
    """Return the smallest `value` of all ranks. Collective, on the CPU."""
    return smallest_of_each([value], group)[0]


def any_rank_and_smallest(flag: bool, value: int) -> tuple[bool, int]:
    """Return what `any_rank` and `smallest` return, by one collective."""
    agreed, least = smallest_of_each([-int(flag), value])
    return agreed < 0, least


def alike(value: int) -> bool:
    """Return whether all ranks have the same `value`, of at most 62 bits. Collective, on the CPU."""
    least, negative_of_largest = smallest_of_each([value, -value])
    return least == -negative_of_largest


def agreeing_group() -> dist.ProcessGroup | None:
    """Return the group of the ranks that agree: that of `among`, or None, for all ranks."""
    return _among[-1] if _among else None


def smallest_of_each(values: list[int], group: dist.ProcessGroup | None = None) -> list[int]:
    """Return of each value the smallest of all ranks, by one collective, on the CPU."""
    beat()
    group = group or agreeing_group()
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return values
    votes = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(votes, op=dist.ReduceOp.MIN, group=group)
    return votes.tolist()


def of_all_ranks(value: int) -> list[int]:
    """Return `value` of each rank of the world, by rank. Collective, on the CPU."""
    beat()
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    values[dist.get_rank()] = value
    dist.all_reduce(values)
    return values.tolist()
