"""The ranks' work in tests of gathering: a net whose blocks run in an order that each forward is given."""

from __future__ import annotations

import faulthandler
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from counting import CountingGathers, gathered
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from raylight.parallel import heartbeat
from raylight.parallel.shares import Weights
from raylight.sharding.fsdp import gathering_of, keep_steady, reset, shard
from raylight.sharding.rows import RowSplit

CPU = torch.device("cpu")
BLOCKS = 5
UNEVEN = (5, 1, 8, 2)  # of 7 rows the second of three ranks has none


@dataclass(frozen=True)
class Order:
    """The blocks that a forward enters, -1 for an error there, and the most gathers of its second time."""

    blocks: tuple[int, ...]
    gathers: int


ORDERS = {
    "as listed": Order((0, 1, 2, 3, 4), 6),
    "some are skipped": Order((0, 1, 4), 4),
    "backwards": Order((4, 3, 2, 1, 0), 6),
    "in turns": Order((0, 3, 1, 4, 2), 6),
    "twice each": Order((0, 0, 1, 1, 2, 2, 3, 3, 4, 4), 6),
    "an error on all ranks": Order((0, 1, -1), 5),
    "as listed again": Order((0, 1, 2, 3, 4), 6),
    "one block by itself": Order((), 2),
    "as listed at last": Order((0, 1, 2, 3, 4), 6),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 7)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(7, 7), nn.Tanh()) for _ in range(BLOCKS))

    def forward(self, x: Tensor, order: tuple[int, ...]) -> Tensor:
        x = self.first(x)
        for index in order:
            if index < 0:
                raise ValueError("simulated fault")
            x = x + self.blocks[index](x)
        return x


def nets(world: int, offload: bool, device: torch.device, shares: Weights = ()) -> tuple[Net, Net, Tensor]:
    """Return a whole net, the same with its weights sharded, and an input (2, 6), on a device."""
    torch.manual_seed(0)
    whole = Net().requires_grad_(False)
    net = Net().requires_grad_(False).to("meta")
    mesh = init_device_mesh(device.type, (world,))
    split = RowSplit.over(mesh, shares[:world])
    shard(net, dict(whole.named_parameters()), mesh, device, offload, split=split)
    return whole.to(device), net, torch.randn(2, 6).to(device)


def on_gpus(rank: int, world: int) -> tuple[dict[str, tuple[bool, bool, int]], dict[str, list[bool]]]:
    """Return what `orders_of_blocks` and `as_a_graph` find on GPUs, of shards there and in system memory."""
    faulthandler.dump_traceback_later(60)  # a rank that hangs says where
    ways = {"sharded": (False, ()), "by memory": (False, UNEVEN), "offloaded": (True, ())}
    orders = {
        f"{name}, {way}": found
        for way, (offload, shares) in ways.items()
        for name, found in orders_of_blocks(rank, world, offload, "cuda", shares).items()
    }
    graphs = {way: as_a_graph(rank, world, offload, shares) for way, (offload, shares) in ways.items()}
    faulthandler.cancel_dump_traceback_later()
    return orders, graphs


def as_a_graph(rank: int, world: int, offload: bool, shares: Weights) -> list[bool]:
    """Return whether forwards on a GPU gave the net's result: eager, as a CUDA graph, and eager again."""
    device = torch.device("cuda", rank)
    whole, net, x = nets(world, offload, device, shares)
    order, equal = ORDERS["in turns"].blocks, []
    with torch.no_grad():
        expected = whole(x, order)
        for _ in range(3):
            equal.append(torch.equal(net(x, order), expected))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = net(x, order)
        for _ in range(3):
            output.zero_()
            graph.replay()
            equal.append(torch.equal(output, expected))
        equal.append(torch.equal(net(x, order), expected))
    return equal


# Blocks that each of three ranks enters in forwards of its own; a rank attends those that it has not.
IN_STEP = (
    ((0, 1, 2, 3, 4), (0, 1, 2, 3, 4), (0, 4), (0, 3, 1, 4, 2), (0, 3, 1, 4, 2), (0, 3, 1, 4, 2), (1,)),
    ((0, 1, 2, 3, 4), (0, 4), (0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (0, 3, 1, 4, 2), (0, 3, 1, 4, 2)),
    ((0, 1, 2, 3, 4), (0, 0, 1, 1, 2, 2, 4, 4), (), (2,), (0, 3, 1, 4, 2), (0, 3, 1, 4, 2)),
)


InStep = list[tuple[bool, bool, list[int]]]


def in_step(rank: int, world: int, offload: bool, shares: Weights) -> tuple[InStep, InStep]:
    """Return what `_in_step` finds, without blocks in others and with such."""
    return _in_step(rank, world, offload, shares, False), _in_step(rank, world, offload, shares, True)


def _in_step(rank: int, world: int, offload: bool, shares: Weights, nested: bool) -> InStep:
    """Return for each forward that some rank does whether this rank's own gave the net's result, if it has one, whether
    weights were shards afterwards, and the places of the blocks that were gathered, in order; and the same for a
    forward that all ranks do together, before that and after it.

    With `nested` a block of the last rank calls another one.
    """
    whole, net, x = nets(world, offload, CPU, shares)
    gathering, found = gathering_of(net), []

    def forward(order: tuple[int, ...] | None, attend: Callable[[], None]) -> None:
        with torch.no_grad(), gathered() as units:
            equal = True
            if order is None:
                attend()
            else:
                equal = torch.equal(net(x, order), whole(x, order))
        at_rest = all(isinstance(one, DTensor) for one in net.parameters() if one.ndim > 1)
        blocks = [gathering._listed.index(one) for one in units if one in gathering._listed]
        found.append((equal, at_rest, blocks))

    together = ORDERS["as listed"].blocks
    forward(together, lambda: None)
    if nested and rank == world - 1:
        for model in (whole, net):
            model.blocks[0][1].register_forward_hook(lambda *call, model=model: call[-1] + model.blocks[3](call[-1]))
    with gathering.in_step() as attend:
        for index in range(max(map(len, IN_STEP))):
            forward(IN_STEP[rank][index] if index < len(IN_STEP[rank]) else None, attend)
    if nested and rank == world - 1:
        for model in (whole, net):
            model.blocks[0][1]._forward_hooks.clear()
    forward(together, lambda: None)
    return found


def names_of_collectives(rank: int, world: int) -> set[str]:
    """Return which collectives forwards call on the CPU, with whole shards, uneven ones, and offloaded ones."""
    with CountingGathers() as called:
        for offload, shares in ((False, ()), (False, UNEVEN), (True, ())):
            _, net, x = nets(world, offload, CPU, shares)
            with torch.no_grad():
                net(x, ORDERS["as listed"].blocks)
    return called.names


def gathers_after_others(rank: int, world: int) -> list[list[object]]:
    """Return the units that a forward gathers, in order, first and after forwards of other blocks."""
    _, net, x = nets(world, False, CPU)
    net(x, (3, 1))  # before graphs are wanted
    keep_steady(net, True)
    found = []
    with torch.no_grad():
        for others in ((0, 1, 2, 3, 4), (0, 1, 4), (4, 3, 2), (0,)):
            net(x, others)
            with gathered() as units:
                net(x, (0, 1, 2, 3, 4))
            found.append([id(unit) for unit in units])
    return found


def orders_of_blocks(
    rank: int, world: int, offload: bool, device_type: str = "cpu", shares: Weights = ()
) -> dict[str, tuple[bool, bool, int]]:
    """Return for each order whether two forwards gave the net's result, weights were shards afterwards, and the number
    of gathers of the second.
    """
    device = torch.device(device_type, rank) if device_type == "cuda" else CPU
    whole, net, x = nets(world, offload, device, shares)
    found = {}
    for name, order in ORDERS.items():
        equal = at_rest = True
        before = 0
        for mode in (torch.inference_mode, torch.no_grad):
            before = heartbeat.beats()
            with mode():
                if not order.blocks:
                    middle = torch.ones(2, 7, device=device)
                    equal &= torch.equal(net.blocks[2](middle), whole.blocks[2](middle))
                elif -1 in order.blocks:
                    with suppress(ValueError):
                        net(x, order.blocks)
                        equal = False
                    reset(net)
                else:
                    equal &= torch.equal(net(x, order.blocks), whole(x, order.blocks))
            at_rest &= all(isinstance(one, DTensor) for one in net.parameters() if one.ndim > 1)
        found[name] = equal, at_rest, heartbeat.beats() - before
    return found
