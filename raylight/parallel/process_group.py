"""Bringing a world of ranks up and down.

Rank 0 hosts the store on a port that the system picks, so no port is ever fixed or guessed.
"""

from __future__ import annotations

import datetime
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .heartbeat import beat


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the ranks of one world meet. `timeout_s` bounds the meeting and every later collective."""

    host: str
    port: int
    world_size: int
    timeout_s: float

    @property
    def timeout(self) -> datetime.timedelta:
        return datetime.timedelta(seconds=self.timeout_s)


def host_store(host: str, world_size: int, timeout_s: float) -> tuple[dist.TCPStore, Rendezvous]:
    """Open the store of a new world on `host`, on a free port. The caller is rank 0 and keeps the store alive."""
    # The store would listen on every interface; a socket that is bound already listens where it was told to.
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
    """Make this process rank `rank` of the world. CPU tensors always go through gloo, CUDA tensors through NCCL."""
    if store is None:
        store = dist.TCPStore(
            rendezvous.host, rendezvous.port, rendezvous.world_size, is_master=False, timeout=rendezvous.timeout
        )
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=rendezvous.world_size, timeout=rendezvous.timeout
    )


def leave_world() -> None:
    """Take the process group down; does nothing when there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()


_among: list[dist.ProcessGroup] = []


@contextmanager
def among(group: dist.ProcessGroup) -> Iterator[None]:
    """Within it, ranks that agree by `any_rank` and `smallest` are those of `group`, which work for themselves."""
    _among.append(group)
    try:
        yield
    finally:
        _among.pop()


def any_rank(flag: bool, group: dist.ProcessGroup | None = None) -> bool:
    """True on every rank if `flag` is true on one of them. Collective, on the CPU."""
    return bool(_agreed(int(flag), dist.ReduceOp.MAX, group))


def smallest(value: int) -> int:
    """The smallest `value` of all ranks. Collective, on the CPU."""
    return _agreed(value, dist.ReduceOp.MIN, None)


def _agreed(value: int, by: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> int:
    beat()
    group = group or (_among[-1] if _among else None)
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return value
    votes = torch.tensor([value], dtype=torch.int64)
    dist.all_reduce(votes, op=by, group=group)
    return int(votes.item())
