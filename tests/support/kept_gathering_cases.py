"""The ranks' work in tests of units that stay gathered between forwards."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from counting import gathered
from gathering_cases import BLOCKS, CPU, ORDERS, Net, nets
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from raylight.sharding.fsdp import gathering_of, reset

NUMBERS = (3, 1, 0, 2, 6, 4, 6, 0, 5)


def kept_in_orders(
    rank: int, world: int, offload: bool, device_type: str = "cpu"
) -> list[tuple[str, int, bool, bool, int]]:
    """Return for each number of kept units and each order of blocks: the order, the number, whether three forwards gave
    the net's result, whether weights were shards afterwards, and the gathers of the last.
    """
    whole, net, x = nets(world, offload, _device(rank, device_type))
    found = []
    for number in NUMBERS:
        gathering_of(net).keep(number)
        for name, order in ORDERS.items():
            equal = True
            with gathered() as units:
                for mode in (torch.inference_mode, torch.no_grad, torch.no_grad):
                    units.clear()
                    with mode():
                        equal &= _is_equal(net, whole, x, order.blocks)
            at_rest = all(isinstance(one, DTensor) for one in net.parameters() if one.ndim > 1)
            found.append((name, number, equal, at_rest, len(units)))
    return found


def kept_on_gpus(rank: int, world: int) -> list[list[bool]]:
    """Return what of the above is right on GPUs, of shards there and in system memory."""
    found = []
    for offload in (False, True):
        in_orders = kept_in_orders(rank, world, offload, "cuda")
        found.append([equal and at_rest for _, _, equal, at_rest, _ in in_orders])
        for case in (after_what_ends_a_forward, after_a_change, nested_blocks):
            found.append([equal for equal, _ in case(rank, world, offload, "cuda")])
    return found


def _device(rank: int, device_type: str) -> torch.device:
    return torch.device("cuda", rank) if device_type == "cuda" else CPU


def _is_equal(net: Net, whole: Net, x: Tensor, blocks: tuple[int, ...]) -> bool:
    if not blocks:
        middle = torch.ones(2, 7, device=x.device)
        return torch.equal(net.blocks[2](middle), whole.blocks[2](middle))
    if -1 in blocks:
        with suppress(ValueError):
            net(x, blocks)
            return False
        reset(net)
        return True
    return torch.equal(net(x, blocks), whole(x, blocks))


def after_what_ends_a_forward(rank: int, world: int, offload: bool, device_type: str = "cpu") -> list[tuple[bool, int]]:
    """Return whether forwards are right, and what they gather, after ones that have ended in the midst, with all units
    or some of them kept: of an error that hooks are told of, and of one that they are not.
    """
    whole, net, x = nets(world, offload, _device(rank, device_type))
    found, listed = [], ORDERS["as listed"].blocks
    for number in (4, 1 + BLOCKS):
        for error in (ValueError, KeyboardInterrupt):
            gathering_of(net).keep(0)
            gathering_of(net).keep(number)
            handle = net.blocks[2].register_forward_pre_hook(_raiser(error))
            with torch.no_grad(), suppress(error):
                net(x, listed)
            handle.remove()
            for again in (number, number, 2):
                if again != number:  # between an end that nobody was told of, and the next forward
                    handle = net.blocks[2].register_forward_pre_hook(_raiser(error))
                    with torch.no_grad(), suppress(error):
                        net(x, listed)
                    handle.remove()
                    gathering_of(net).keep(again)
                with torch.no_grad(), gathered() as units:
                    found.append((torch.equal(net(x, listed), whole(x, listed)), len(units)))
    return found


def _raiser(error: type[BaseException]) -> Any:
    def fail(*_: Any) -> None:
        raise error

    return fail


def after_a_change(rank: int, world: int, offload: bool, device_type: str = "cpu") -> list[tuple[bool, int]]:
    """Return whether forwards are right, and what they gather: twice before weights change, and twice after."""
    whole, net, x = nets(world, offload, _device(rank, device_type))
    gathering, listed = gathering_of(net), ORDERS["as listed"].blocks
    gathering.keep(4)
    found = []
    for _ in range(2):
        with torch.no_grad():
            for _ in range(2):
                with gathered() as units:
                    found.append((torch.equal(net(x, listed), whole(x, listed)), len(units)))
            for one in whole.parameters():
                one.mul_(2)
            for one in net.parameters():
                (one.to_local() if isinstance(one, DTensor) else one).mul_(2)
        gathering.forget()
    return found


def nested_blocks(rank: int, world: int, offload: bool, device_type: str = "cpu") -> list[tuple[bool, int]]:
    """Return the same for blocks within blocks, for several numbers of kept units."""
    whole, net, x = nets(world, offload, _device(rank, device_type))

    def within(model: Net, inner: int) -> Any:
        def call(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            return output + model.blocks[inner](output)

        return call

    for model in (whole, net):
        model.blocks[0][1].register_forward_hook(within(model, 3))
        model.blocks[4][1].register_forward_hook(within(model, 1))
    found = []
    for number in (0, 2, 4, 6):
        gathering_of(net).keep(number)
        for _ in range(3):
            with torch.no_grad(), gathered() as units:
                found.append((torch.equal(net(x, (0, 2, 4)), whole(x, (0, 2, 4))), len(units)))
    return found


def bytes_that_units_take(rank: int, world: int) -> list[tuple[int, int, int, int]]:
    """Return for each number of kept units the bytes that buffers have between forwards and within one, and what
    `kept_bytes` and `passing_bytes` say.
    """
    _, net, x = nets(world, False, CPU)
    gathering = gathering_of(net)
    buffers = {*gathering._own.values(), *gathering._buffers, gathering._gatherer._staging}

    def taken() -> int:
        return sum(one._tensor.untyped_storage().nbytes() for one in buffers if one._tensor is not None)

    within = []
    net.blocks[4].register_forward_hook(lambda *_: within.append(taken()))
    found = []
    for number in range(2 + BLOCKS):
        gathering.keep(number)
        with torch.no_grad():
            net(x, ORDERS["as listed"].blocks)
        found.append((taken(), within[-1], gathering.kept_bytes(number), gathering.passing_bytes(number)))
    return found
