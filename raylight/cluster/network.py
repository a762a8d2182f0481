"""Which network interface of a machine leads to another one."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import MutableMapping

import psutil

logger = logging.getLogger(__name__)

# By which gloo and NCCL are told their interface. A user may have set them for a machine: then they rule.
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_ANY_PORT = 9  # nothing is sent there: to connect a UDP socket only asks the system for the route


def address_towards(peer: str) -> str:
    """Return this machine's address on the route to the address `peer`. Raises OSError: when there is no route."""
    family = socket.getaddrinfo(peer, _ANY_PORT, type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, _ANY_PORT))
        return probe.getsockname()[0]


def interface_of(address: str) -> str | None:
    """Return the name of the interface that has an address of this machine, None if none has it."""
    for name, found in psutil.net_if_addrs().items():
        # The address of a link-local IPv6 interface ends with the interface.
        if any(one.address.partition("%")[0] == address.partition("%")[0] for one in found):
            return name
    return None


def use_route_to(peer: str, environ: MutableMapping[str, str] = os.environ) -> None:
    """Have gloo and NCCL in this process use the interface that leads to the address `peer`, which may be this
    machine's own, unless the user has chosen one by their variables.

    Without a choice gloo takes the address of the machine's name, which many systems map to the loopback interface.
    """
    unset = [name for name in INTERFACE_VARIABLES if not environ.get(name)]
    if not unset:
        return
    try:
        # The system would route what goes to its own address over the loopback interface.
        interface = interface_of(peer) or interface_of(address_towards(peer))
    except OSError as error:
        logger.warning("no route to %s is known, so gloo and NCCL choose an interface themselves: %s", peer, error)
        return
    if interface is None:
        logger.warning("no interface leads to %s, so gloo and NCCL choose one themselves", peer)
        return
    environ.update(dict.fromkeys(unset, interface))
